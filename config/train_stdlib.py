# command:  python train.py config/train_stdlib.py
#           (first python data/stdlib/prepare.py; make train does both)
# device:   two CPU cores
# duration: one to three minutes
# expected: 1.78 bits per byte in validation (+- 0.06)
out_dir = 'out-stdlib'
dataset = 'stdlib'

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0

gradient_accumulation_steps = 1
batch_size = 16
block_size = 64

learning_rate = 4e-3
min_lr = 0.0
warmup_iters = 250
max_iters = 2000
lr_decay_iters = max_iters
beta2 = 0.99  # nearer to 1 than usual, since one update sees few tokens

eval_interval = 250
eval_iters = 40
log_interval = 10

sample_interval = 1000
sample_start = 'def __init__(self, '
sample_tokens = 150
