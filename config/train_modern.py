# command:  torchrun --standalone --nproc_per_node=8 train.py config/train_modern.py
#           (first python data/fineweb_edu/prepare.py --source=HuggingFaceFW/fineweb --name=fineweb)
# device:   8 GPUs with 80 GB each, or one; any number of processes makes the same updates
# duration: not measured here; modded-nanogpt reports 58 minutes on one H100 for 3250 steps of this size
# expected: not measured here; the loss of OpenAI's GPT-2 there, 3.28, in 1.5e9 tokens. llm.c's GPT-2 takes 10.3e9
out_dir = 'out-modern'
dataset = 'fineweb'
wandb_project = 'modern'

# 162M parameters, of which 124M multiply: as many as in GPT-2, whose heads are half as wide and twice as many
arch = 'modern'
n_layer = 12
n_head = 6
n_embd = 768
bias = False
tie_weights = False

# one update: 524,288 tokens
total_batch_size = 524288
batch_size = 32
block_size = 1024
max_iters = 2860
lr_decay_iters = max_iters

# Muon's rate; those of the other parameters are in a fixed ratio to it (train.py, groups_of_modern)
learning_rate = 0.025
min_lr = 0.0
weight_decay = 0.05
beta1 = 0.8
beta2 = 0.95
grad_clip = 0.0  # a step of Muon has the same size, however long the gradient is

# constant at first, without a warm-up, then along a line to 0
schedule = 'wsd'
decay_fraction = 0.7
warmup_iters = 0

eval_interval = 250
eval_iters = 320  # batches of 32: the 10,485,760 tokens on which GPT-2's loss is 3.28
hellaswag_interval = 250
sample_interval = 1000
sample_start = 'Once upon a time'
