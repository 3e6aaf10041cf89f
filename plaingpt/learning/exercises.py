"""The exercises, in the order of docs/ladder.md: what each asks for, and a hint."""
import model
import model_trivialised
import parallel_trivialised
import tokenizer_trivialised
import train_trivialised
from plaingpt.learning import by_hand, questions
from plaingpt.learning.part import Exercise

B, T, L, P = tokenizer_trivialised, model_trivialised, train_trivialised, parallel_trivialised
EXERCISES = [
    Exercise(B, 'merge', questions.run_merge,
        'Replace a pair of neighbours by one new token, from left to right. Encoding does nothing else.',
        'Walk with an index i: after a pair it moves by two, else by one. Mind the last id, which has no '
        'neighbour.'),
    Exercise(B, 'most_frequent_pair', questions.run_most_frequent_pair,
        'Find the pair of neighbours that the text has most often. It comes as words, each with how often the '
        'text has it; of equally frequent pairs, the smallest counts.',
        'Count into a Counter with itertools.pairwise; min() with a key that is a tuple breaks ties.'),
    Exercise(B, 'encode', questions.run_encode,
        'Cut the text into words, and in each do the merges in the order in which they were learned.',
        'Two loops: over words, and in them over merges. Merge number i makes token 256 + i.'),
    Exercise(T, 'GPT.generate', questions.run_generate,
        'Continue a text: predict, draw one token by its probability, append it, and again; the model reads the '
        'last block_size tokens. draw(seed, row, number) / 2**63 is a number from 0 to 1 for row and number of '
        'the new token: take the first token at which the sum of the probabilities reaches it.',
        'Cut idx to its last block_size tokens before each call. Probabilities are softmax of the logits at the '
        'last position; cumsum adds them up, and a comparison, summed, counts how many lie before the drawn '
        'number.'),
    Exercise(T, 'cross_entropy', questions.run_cross_entropy,
        'How surprised is the model, in nats, on average? Return the mean of minus the logarithm of the '
        'probability that softmax gives to what really came next, without the exponential of a large number.',
        '-log(exp(z_y) / sum(exp(z))) = log(sum(exp(z))) - z_y; the largest logit can be taken out of the sum, so'
        ' that no exponential is above 1. Tensor.gather picks z_y.'),
    Exercise(by_hand, 'gradient_of_cross_entropy', questions.run_gradient,
        'What autograd finds, by hand: how does the mean loss change with each logit?',
        'Write the loss of one token as log(sum(exp(z))) - z_y. The derivative of the first term is softmax(z); '
        'that of the second is 1 at y, and 0 elsewhere. The mean divides both.'),
    Exercise(T, 'softmax', questions.run_softmax,
        'Make probabilities of numbers: above 0, in the same order, with sum 1 along the last dimension; of '
        'numbers such as 1000, too, whose exponential is infinite.',
        'softmax(x) = softmax(x - c) for any c: which c keeps all exponentials at most 1? keepdim=True keeps '
        'shapes that broadcast.'),
    Exercise(T, 'gelu', questions.run_gelu,
        "GPT-2's nonlinearity, by its tanh formula (Hendrycks and Gimpel 2016): 0.5 x (1 + tanh(sqrt(2 / pi) (x +"
        ' 0.044715 x^3))).',
        'torch.tanh and math.sqrt; the cube is of x alone.'),
    Exercise(T, 'LayerNorm.forward', questions.run_layer_norm,
        'Shift and scale the channels of each token to mean 0 and variance 1, then apply the learned gain and, if'
        ' there is one, the bias.',
        'Mean and variance are of the last dimension only, with keepdim=True. The variance is a mean of squares; '
        '1e-5 is added to it before the root is taken.'),
    Exercise(T, 'Attention.forward', questions.run_attention,
        'All heads: make q, k and v in one product, cut them into heads, attend in each, put the heads side by '
        'side again, and let c_proj mix them.',
        'Tensor.chunk cuts twice, both times along the last dimension: into q, k and v, then each into n_head '
        'heads.'),
    Exercise(T, 'attend', questions.run_attend,
        'One head of attention: compare each query with all keys, hide the future, make probabilities of the '
        'rest, and mix the values with them.',
        'Five steps: a table of products (B, T, T), rows are queries; divide; hide with masked_fill; softmax; '
        'multiply by v. torch.ones(T, T).tril() is 1 at and below the diagonal.',
        questions.is_causal),
    Exercise(T, 'Block.forward', questions.run_block,
        'One layer: attention, then the MLP; each reads the normalised stream, and adds to the stream.',
        'Two lines of the form x = x + part(norm(x)), each with a LayerNorm of its own.'),
    Exercise(T, 'GPT.init_weights', questions.run_init_weights,
        'First weights: Normal(0, 0.02), gains 1, biases 0; the two matrices of a layer that add to the stream '
        'are smaller by the root of how many of them the model has. Draw in the order of named_parameters().',
        "Four cases, told apart by the name ('bias', 'c_proj.weight') and by p.dim(). Tensors are filled in "
        'place: zero_, fill_, normal_.'),
    Exercise(L, 'lr_at', questions.run_lr_at,
        'The learning rate: rise linearly over the warm-up, so that step 0 has a rate above 0 and the peak comes '
        'right after it; fall along half a cosine to the floor; stay there.',
        'Two cases. In the second, make a number that goes from 0 to 1 and stays there, and feed it to 0.5 * (1 +'
        ' cos(pi * it)), which goes from 1 to 0.'),
    Exercise(L, 'clip', questions.run_clip,
        'If the gradient of all weights, as one long vector, is longer than the limit, shorten it to that (with '
        '1e-6 added to the length, as PyTorch does). Return the gradients, and the length before.',
        'The length of one long vector is the root of the sum of all squares. One factor for all gradients, at '
        'most 1, keeps the direction.'),
    Exercise(L, 'adamw', questions.run_adamw,
        'One update of one weight, in place: the running means m and v of the gradient and of its square, the '
        'correction for their start at 0, the pull towards zero, the step.',
        'Change p, m and v with +=, -= or methods that end in _. The corrections divide by 1 - beta ** (step + '
        '1). The pull is lr * decay * p; it does not pass through m and v.'),
    Exercise(P, 'accumulate', questions.run_accumulate,
        'The same gradient as from the whole batch, although only batch_size windows fit into memory at a time; the '
        'last part may be smaller than the others.',
        'gradients_of yields what each part adds, weighted by its share of the windows: add these up, weight by '
        'weight. Or do it yourself: a part of 1 window counts less than a part of 3.'),
    Exercise(P, 'reduce_scatter', questions.run_reduce_scatter,
        'Each machine holds a tensor; afterwards machine i holds piece i of their sum, flat. The plain file goes '
        'round in a ring; any way that gives the same sums is right.',
        'Cut each tensor, flattened, with tensor_split(n). In a ring, machine i passes on piece (i - turn - 1) % '
        'n, and its neighbour adds it to its own; after n - 1 turns, piece i is complete at machine i.'),
    Exercise(P, 'data_parallel', questions.run_data_parallel,
        'Each machine has a part of the windows, and parts need not be equal; afterwards each holds the gradient '
        'of the mean loss over all windows: a list for each machine.',
        'tensor_split(n_machines) makes the parts; gradients_of weights them by their share; all_reduce adds up '
        'what the machines have of one weight. Mind the order of the lists: [machine][weight].'),
    Exercise(P, 'zero1', questions.run_zero1,
        "AdamW's update with the moments dealt out: weight i belongs to machine i % n, which alone has its "
        'moments; afterwards all machines have all new weights. In place.',
        'For each weight: its owner calls adamw with its own copy of the weight, then everyone else copies it: '
        'Tensor.copy_.'),
    Exercise(model, 'Cache.extend', questions.run_cache,
        'Keep the keys and values of the tokens that have been read, so that the next token need not read them '
        'again. If more tokens are read than there is room for, a new one takes the place of the oldest.',
        'The first call knows the shapes: make room then. Token number n goes to place n % room; what is returned'
        ' holds only places that have been written.'),
    Exercise(model, 'choose', questions.run_choose,
        'Draw a token for each row: divide by the temperature, keep the top_k likeliest, of these the fewest that'
        ' hold top_p of the probability; temperature 0 takes the likeliest. A draw is a whole number below 2**63:'
        ' draw / 2**63 of the probability lies before its token.',
        'Sort by probability first (topk). With cumsum, the probability before a token is the sum up to it less '
        'its own: if that is top_p or more, the token is not needed. Places among the sorted are not token '
        'ids.'),
]
