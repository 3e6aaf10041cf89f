# command:  python train.py config/train_shakespeare_char.py
#           (first python data/shakespeare_char/prepare.py)
# device:   one GPU; on a CPU make it smaller, for example with --n_layer=4 --n_head=4 --n_embd=128 --block_size=64
#           --batch_size=12 --max_iters=2000 --lr_decay_iters=2000 --eval_iters=20 --dropout=0
# duration: not measured here; nanoGPT, whose values these are, reports about 3 minutes on one A100
# expected: not measured here; nanoGPT reports a best validation loss of 1.4697 (and 1.88 for the small one on a CPU)
out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

# so small a text is soon overfit: evaluate often, and keep only what improved
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

learning_rate = 1e-3
min_lr = learning_rate / 10
warmup_iters = 100
max_iters = 5000
lr_decay_iters = max_iters
beta2 = 0.99  # nearer to 1 than usual, since one update sees few tokens
