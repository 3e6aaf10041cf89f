# command:  python train.py config/gpt_nano.py
#           (first python data/shakespeare_char/prepare.py)
# device:   a CPU
# duration: not measured here
# expected: not measured here
# The shape that minGPT calls gpt-nano (0.1M parameters), on the characters of tiny Shakespeare.
out_dir = 'out-gpt-nano'
dataset = 'shakespeare_char'

n_layer = 3
n_head = 3
n_embd = 48
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
