# command:  python train.py config/train_stdlib.py
#           (first python data/stdlib/prepare.py; make train does both)
# device:   two CPU cores
# duration: not measured yet
# expected: not measured yet
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
min_lr = learning_rate / 10
warmup_iters = 100
max_iters = 3000
lr_decay_iters = max_iters
beta2 = 0.99  # nearer to 1 than usual, since one update sees few tokens

eval_interval = 500
eval_iters = 50
sample_interval = 1000
log_interval = 10
always_save_checkpoint = True
