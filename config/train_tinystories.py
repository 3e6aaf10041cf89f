# command:  python train.py config/train_tinystories.py
#           (first python data/tinystories/prepare.py)
# device:   one GPU; on a CPU make it smaller, for example with --n_layer=4 --n_head=4 --n_embd=128 --block_size=128
#           --batch_size=16 --max_iters=3000 --lr_decay_iters=3000 --eval_iters=20
# duration: not measured here
# expected: not measured here; stories with a beginning and an end
out_dir = 'out-tinystories'
dataset = 'tinystories'

n_layer = 6
n_head = 6
n_embd = 384

# one update: 64 sequences x 256 tokens = 16,384 tokens
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

learning_rate = 1e-3
min_lr = learning_rate / 10
warmup_iters = 200
max_iters = 10000
lr_decay_iters = max_iters
beta2 = 0.99  # nearer to 1 than usual, since one update sees few tokens

eval_interval = 500
eval_iters = 50
log_interval = 10

sample_interval = 1000
sample_start = 'Once upon a time'
sample_tokens = 200
