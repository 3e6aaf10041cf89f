# command:  python train.py config/finetune_shakespeare.py
#           (first python data/shakespeare/prepare.py; GPT-2's weights are downloaded, 6 GB for gpt2-xl)
# device:   one GPU that holds gpt2-xl and its optimizer state, about 25 GB; --init_from=gpt2 needs a tenth of it
# duration: not measured here; nanoGPT, whose values these are, reports a few minutes on one GPU
# expected: not measured here
out_dir = 'out-shakespeare'
dataset = 'shakespeare'
init_from = 'gpt2-xl'
wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = 'ft-{time}'  # the time at which the run starts

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # the text is small: keep only what improved

# one update: 1 sequence x 1024 tokens x 32 micro-batches = 32,768 tokens; the text has 301,966, nine updates an epoch
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
