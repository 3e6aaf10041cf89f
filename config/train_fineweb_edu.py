# command:  torchrun --standalone --nproc_per_node=8 train.py config/train_fineweb_edu.py
#           (first python data/fineweb_edu/prepare.py)
# device:   8 GPUs with 40 GB each; any number of processes makes the same updates. With half the batch and twice the
#           steps: --total_batch_size=262144 --max_iters=38146 --lr_decay_iters=38146 --warmup_iters=700
# duration: not measured here; llm.c, written in CUDA, reports 90 minutes on 8 A100 for 10 billion tokens
# expected: not measured here; OpenAI's GPT-2 of this size has a loss of 3.29 on FineWeb-Edu, as build-nanogpt measures
out_dir = 'out-fineweb-edu'
dataset = 'fineweb_edu'
wandb_project = 'gpt2-10BT'

# one update: 524,288 tokens; 19,073 of them read the sample once
total_batch_size = 524288
batch_size = 16
block_size = 1024
max_iters = 19073
lr_decay_iters = max_iters

learning_rate = 6e-4
min_lr = learning_rate / 10
warmup_iters = 715
weight_decay = 0.1

eval_interval = 250
eval_iters = 160
hellaswag_interval = 250
sample_interval = 1000
sample_start = 'Once upon a time'
