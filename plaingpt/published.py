"""Figures that other projects have published, to stand beside this project's."""

# All are measured on all examples. OpenWebText: nanoGPT's README. Completion style: acc as stated in build-nanogpt's
# hellaswag.py, acc_norm as drawn by llm.c. lm-eval: as stated in both. LAMBADA: the first row is lm-eval's, the
# accuracies of the other GPT-2s are llm-foundry's. GPT-3: Brown et al. 2020, table H.1, zero-shot, in a scoring of
# OpenAI's own, which llm.c draws beside the completion style.
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    'val of openwebtext': {
        'GPT-2 124M': {'loss': 3.12},
        'GPT-2 355M': {'loss': 2.84},
        'GPT-2 774M': {'loss': 2.67},
        'GPT-2 1558M': {'loss': 2.54},
    },
    'hellaswag_completion': {
        'GPT-2 124M': {'acc': 0.2859, 'acc_norm': 0.2945},
        'GPT-2 355M': {'acc_norm': 0.3752},
        'GPT-2 774M': {'acc_norm': 0.4320},
        'GPT-2 1558M': {'acc': 0.3842, 'acc_norm': 0.4889},
        'GPT-3 125M': {'acc_norm': 0.337},
        'GPT-3 350M': {'acc_norm': 0.436},
        'GPT-3 760M': {'acc_norm': 0.510},
        'GPT-3 1.3B': {'acc_norm': 0.547},
    },
    'hellaswag_lm_eval': {
        'GPT-2 124M': {'acc': 0.2892, 'acc_norm': 0.3114},
        'GPT-2 1558M': {'acc': 0.4004, 'acc_norm': 0.5089},
    },
    'lambada_openai': {
        'GPT-2 124M': {'acc': 0.3256, 'perplexity': 40.06},
        'GPT-2 355M': {'acc': 0.426},
        'GPT-2 774M': {'acc': 0.488},
        'GPT-2 1558M': {'acc': 0.523},
        'GPT-3 125M': {'acc': 0.427, 'perplexity': 18.6},
        'GPT-3 350M': {'acc': 0.543, 'perplexity': 9.09},
        'GPT-3 760M': {'acc': 0.604, 'perplexity': 6.53},
        'GPT-3 1.3B': {'acc': 0.636, 'perplexity': 5.44},
    },
}

# The title of each scoring in a table
TITLES = {
    'hellaswag_completion': 'HellaSwag in completion style, as build-nanogpt and llm.c score it',
    'hellaswag_lm_eval': 'HellaSwag as lm-eval scores it',
    'lambada_openai': "LAMBADA as lm-eval's lambada_openai scores it",
}
