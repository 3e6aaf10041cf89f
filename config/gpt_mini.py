# command:  python train.py config/gpt_mini.py
#           (first python data/shakespeare_char/prepare.py)
# device:   one GPU, or a CPU with patience
# duration: not measured here
# expected: not measured here
# The shape that minGPT calls gpt-mini (2.7M parameters), on the characters of tiny Shakespeare.
out_dir = 'out-gpt-mini'
dataset = 'shakespeare_char'

n_layer = 6
n_head = 6
n_embd = 192
dropout = 0.1
bias = True
tie_weights = False

# one update: 216 sequences x 128 tokens = 27,648 tokens
gradient_accumulation_steps = 1
batch_size = 216
block_size = 128

learning_rate = 3e-4
decay_lr = False
max_iters = 2000

eval_interval = 200
eval_iters = 20
log_interval = 10
