# command:  python train.py config/train_modern_shakespeare_char.py
#           (first python data/shakespeare_char/prepare.py)
# device:   a CPU: the modern twin of nanoGPT's recipe for one, which is config/train_shakespeare_char.py made smaller
# duration: half a minute
# expected: val loss 1.80 (+- 0.03); nanoGPT reports 1.88 for its recipe, in 2000 steps
out_dir = 'out-modern-shakespeare-char'
dataset = 'shakespeare_char'

arch = 'modern'
n_layer = 4
n_head = 2
n_embd = 128
bias = False
tie_weights = False

gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

learning_rate = 0.025
min_lr = 0.0
schedule = 'wsd'
decay_fraction = 0.7
warmup_iters = 0
max_iters = 300
lr_decay_iters = max_iters
weight_decay = 0.05
beta1 = 0.8
beta2 = 0.95
grad_clip = 0.0

eval_interval = 100
eval_iters = 200
log_interval = 10
sample_interval = 300
