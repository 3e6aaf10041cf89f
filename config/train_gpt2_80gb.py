# command:  torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_80gb.py
#           (first python data/openwebtext/prepare.py; without a wandb account add --wandb_log=False)
# device:   1, 2, 4 or 8 GPUs with 80 GB each, or more (A100, H100, H200): room for larger micro-batches
# duration: not measured here
# expected: not measured here; the same updates, but for rounding, as train_gpt2.py, which all else is taken from
out_dir = 'out-gpt2-80gb'
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'

# one update: 60 sequences x 1024 tokens x 8 micro-batches = 491,520 tokens, as in train_gpt2.py
batch_size = 60
block_size = 1024
gradient_accumulation_steps = 8

# 294.9 billion tokens, about 33 times the corpus
max_iters = 600000
lr_decay_iters = 600000
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 40  # batches of 60: as many windows as in train_gpt2.py
log_interval = 10
