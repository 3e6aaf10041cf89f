# command:  python train.py config/train_modern_stdlib.py
#           (first python data/stdlib/prepare.py)
# device:   two CPU cores
# duration: as long as config/train_stdlib.py, whose modern twin it is
# expected: 1.6 bits per byte in validation (+- 0.06)
out_dir = 'out-modern-stdlib'
dataset = 'stdlib'

arch = 'modern'
n_layer = 4
n_head = 2
n_embd = 128
bias = False
tie_weights = False

gradient_accumulation_steps = 1
batch_size = 16
block_size = 64

learning_rate = 0.025
min_lr = 0.0
schedule = 'wsd'
decay_fraction = 0.7
warmup_iters = 0
max_iters = 1250
lr_decay_iters = max_iters
weight_decay = 0.05
beta1 = 0.8
beta2 = 0.95
grad_clip = 0.0

eval_interval = 250
eval_iters = 40
log_interval = 10

sample_interval = 1000
sample_start = 'def __init__(self, '
sample_tokens = 150
