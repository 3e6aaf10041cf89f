# command:  torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
#           (first python data/openwebtext/prepare.py; without a wandb account add --wandb_log=False)
# device:   8 GPUs with 40 GB each; any number of processes that divides 40 makes the same updates
# duration: not measured here; nanoGPT, whose values these are, reports about four days on 8 A100
# expected: not measured here; nanoGPT reports a loss of about 2.85 on OpenWebText
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'

# one update: 12 sequences x 1024 tokens x 40 micro-batches = 491,520 tokens
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# 294.9 billion tokens, about 33 times the corpus
max_iters = 600000
lr_decay_iters = 600000
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200
log_interval = 10
