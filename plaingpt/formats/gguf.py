"""A GPT-2 for llama.cpp and Ollama: one GGUF file, under llama.cpp's names, and a Modelfile for Ollama."""
import json
from pathlib import Path

from plaingpt.corpus.tokenizer import END_OF_TEXT, Tokenizer, is_gpt2_like
from plaingpt.errors import UserError
from plaingpt.formats import huggingface
from plaingpt.formats.exported import Exported

BLOCK = 32  # weights that share a scale in q8_0
NO_MERGES = ['Ā Ā']  # there must be one: it joins two NULs, which no text has, and then cuts them, being no token
MODELFILE = '''# ollama create NAME -f Modelfile && ollama run NAME
FROM ./model.gguf
# It continues a text, and has no notion of a conversation.
TEMPLATE """{{{{ .Prompt }}}}"""
{stop}PARAMETER num_ctx {config.block_size}
PARAMETER temperature 0.8
PARAMETER top_k 200
'''


def write(folder: Path, exported: Exported) -> None:
    """Write the whole model, and a Modelfile. As llama.cpp wants it, vectors and positions are always float32, and a
    tied head is left out. The model must have biases and the tanh GELU. Raise UserError for a tokenizer that llama.cpp
    lacks: it knows patterns of words by name, and has none for characters. Raise it, too, for a width that q8_0 cannot
    have, with 8 bits for each weight and a scale for 32 of them."""
    import gguf
    from gguf.quants import quantize

    config, vocabulary = exported.config, exported.vocabulary
    if not is_gpt2_like(vocabulary):
        raise UserError(f"the tokenizer '{vocabulary.name}' cannot be written as GGUF: llama.cpp knows GPT-2's way to "
                        'cut a text into words and to merge bytes\ntake a model with byte, bpe:N or gpt2, or --to=hf')
    if exported.dtype == 'q8_0' and config.n_embd % BLOCK:
        raise UserError(f'n_embd={config.n_embd} is not a multiple of {BLOCK}, as q8_0 needs: give --dtype=float16')
    file_type, kind = {
        'float32': (gguf.LlamaFileType.ALL_F32, gguf.GGMLQuantizationType.F32),
        'float16': (gguf.LlamaFileType.MOSTLY_F16, gguf.GGMLQuantizationType.F16),
        'q8_0': (gguf.LlamaFileType.MOSTLY_Q8_0, gguf.GGMLQuantizationType.Q8_0)}[exported.dtype]
    library = huggingface.tokenizer_of(vocabulary)
    merges = [' '.join(pair) for pair in json.loads(library.to_str())['model']['merges']]
    added = library.get_added_tokens_decoder()  # they stand for themselves in any text
    end = vocabulary.pieces.index(b'\0') if vocabulary.eot is None else vocabulary.eot  # there must be one, too
    values = {  # under the names of the writer's methods
        'name': exported.name,
        'block_count': config.n_layer,
        'context_length': config.block_size,
        'embedding_length': config.n_embd,
        'feed_forward_length': 4 * config.n_embd,
        'head_count': config.n_head,
        'layer_norm_eps': 1e-5,
        'vocab_size': config.vocab_size,
        'file_type': file_type,
        'tokenizer_model': 'gpt2',
        'tokenizer_pre': 'gpt-2',
        'token_list': [library.id_to_token(i) or f'[unused {i}]' for i in range(vocabulary.n_vocab)],
        'token_types': [
            gguf.TokenType.CONTROL if not size or i in vocabulary.special else
            gguf.TokenType.USER_DEFINED if i in added else gguf.TokenType.NORMAL
            for i, size in enumerate(vocabulary.token_sizes())],
        'token_merges': merges or NO_MERGES,
        'bos_token_id': end if vocabulary.bos is None else vocabulary.bos,
        'eos_token_id': end,
        'add_bos_token': vocabulary.bos is not None and vocabulary.encode_prompt('') == [vocabulary.bos],
    }
    writer = gguf.GGUFWriter(folder / 'model.gguf', 'gpt2')
    for name, value in values.items():
        getattr(writer, f'add_{name}')(value)

    name_of = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    for name, tensor in exported.weights.items():
        module, _, role = name.rpartition('.')
        is_exact = tensor.dim() == 1 or module == 'transformer.wpe'
        own = gguf.GGMLQuantizationType.F32 if is_exact else kind
        writer.add_tensor(f'{name_of[module]}.{role}', quantize(tensor.float().numpy(), own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / 'Modelfile').write_text(MODELFILE.format(stop=stop_of(vocabulary), config=config), encoding='utf-8')


def stop_of(vocabulary: Tokenizer) -> str:
    """Return the lines of a Modelfile that end a text at the names of special tokens."""
    names = [vocabulary.pieces[i].decode() for i in vocabulary.stops if i in vocabulary.special]
    if not vocabulary.stops:
        names = [END_OF_TEXT]
    return ''.join(f'PARAMETER stop "{name}"\n' for name in names)
