"""A GPT-2 for llama.cpp and Ollama: one GGUF file, under llama.cpp's names, and what Ollama wants to know of it."""
import json
from pathlib import Path

import torch
from torch import Tensor

from model import GPTConfig
from plaingpt.corpus import tokenizer
from plaingpt.corpus.tokenizer import END_OF_TEXT, Tokenizer
from plaingpt.errors import UserError
from plaingpt.formats import huggingface

NO_MERGES = ['Ā Ā']  # there must be one: two NULs, which no text has, would be merged, and cut again, being no token
MODELFILE = '''# ollama create NAME -f Modelfile && ollama run NAME
FROM ./model.gguf
# It continues a text, and has no notion of a conversation.
TEMPLATE """{{{{ .Prompt }}}}"""
PARAMETER stop "{stop}"
PARAMETER num_ctx {config.block_size}
PARAMETER temperature 0.8
PARAMETER top_k 200
'''


def check(vocabulary: Tokenizer) -> None:
    """Refuse what llama.cpp cannot say: it knows the pattern of words of each tokenizer by name, and no characters."""
    if not tokenizer.is_gpt2_like(vocabulary):
        raise UserError(f"the tokenizer '{vocabulary.name}' cannot be written as GGUF: llama.cpp knows GPT-2's way to "
                        'cut a text into words and to merge bytes\ntake a model with byte, bpe:N or gpt2, or --to=hf')


def write(folder: Path, name: str, config: GPTConfig, weights: dict[str, Tensor], vocabulary: Tokenizer,
          dtype: torch.dtype) -> None:
    """The whole model, and a Modelfile. As llama.cpp wants it, vectors and positions are float32 always, and a tied
    head is left out. The model must have biases and the tanh GELU."""
    import gguf

    check(vocabulary)
    writer = gguf.GGUFWriter(folder / 'model.gguf', 'gpt2')
    writer.add_name(name)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if dtype == torch.float16 else gguf.LlamaFileType.ALL_F32)

    library = huggingface.tokenizer_of(vocabulary)
    special = {i for i, size in enumerate(vocabulary.token_sizes()) if not size}
    tokens = [library.id_to_token(i) or f'[unused {i}]' for i in range(vocabulary.n_vocab)]
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre('gpt-2')
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL
                            for i in range(vocabulary.n_vocab)])
    merges = [' '.join(pair) for pair in json.loads(library.to_str())['model']['merges']]
    writer.add_token_merges(merges or NO_MERGES)
    end = vocabulary.pieces.index(b'\0') if vocabulary.eot is None else vocabulary.eot  # there must be one, too
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)

    name_of = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    for ours, tensor in weights.items():
        if ours == 'lm_head.weight' and config.tie_weights:
            continue
        is_matrix = tensor.dim() == 2 and ours != 'transformer.wpe.weight'
        theirs = name_of.get_name(ours, try_suffixes=('.weight', '.bias'))
        assert theirs, f'llama.cpp has no name for {ours}'
        writer.add_tensor(theirs, tensor.to(dtype if is_matrix else torch.float32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    text = MODELFILE.format(stop=END_OF_TEXT, config=config)
    (folder / 'Modelfile').write_text(text, encoding='utf-8')
