# command:  python train.py config/eval_gpt2.py
#           (first python data/openwebtext/prepare.py; the weights are downloaded)
#           or, for more than the loss: python evaluate.py --init_from=gpt2 --dataset=openwebtext
# device:   one GPU, or a CPU with patience and --eval_iters=20
# duration: not measured here
# expected: not measured here; nanoGPT reports a validation loss of 3.12 (124M parameters). OpenAI trained it on
#           another text: a smaller model that is trained on OpenWebText itself does better than this suggests
init_from = 'gpt2'
batch_size = 8
eval_iters = 500  # 8 x 500 sequences of 1024 tokens: most of the validation split
eval_only = True
wandb_log = False
