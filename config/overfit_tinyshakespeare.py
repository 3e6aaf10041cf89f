# command:  python train.py config/overfit_tinyshakespeare.py
#           (first python data/tinyshakespeare/prepare.py)
#           for GPT-2's own size, before a long run on two GPUs, learn 64 windows of 1024 tokens:
#           torchrun --standalone --nproc_per_node=2 train.py config/overfit_tinyshakespeare.py --n_layer=12 --n_head=12
#           --n_embd=768 --block_size=1024 --batch_size=16 --total_batch_size=65536 --learning_rate=6e-4 --min_lr=6e-5
#           --max_iters=200 --lr_decay_iters=200
# device:   a CPU
# duration: half a minute; at GPT-2's size not measured here
# expected: PASS, a loss of 0.03 after 60 steps; a model or a loop that is wired wrong ends with FAIL and exit code 1
out_dir = 'out-tinyshakespeare'
dataset = 'tinyshakespeare'
overfit_single_batch = True

n_layer = 2
n_head = 2
n_embd = 64

# the one batch: 4 windows x 64 tokens
total_batch_size = 256
batch_size = 4
block_size = 64

learning_rate = 1e-2
min_lr = learning_rate / 10
warmup_iters = 10
max_iters = 60
lr_decay_iters = max_iters
sample_interval = 0
