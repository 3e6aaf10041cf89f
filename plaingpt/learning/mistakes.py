"""Known mistakes: each in words, and as a change of the plain file's lines.

A learner's lines are told a cause only if the plain file with this change gives the same numbers as they do.
"""


class Mistake:
    """A cause in words, and the changes that plant it: each an old piece of a part's body and the new one."""

    def __init__(self, says: str, *changes: tuple[str, str]) -> None:
        self.says = says
        self.changes = changes

    def planted(self, body: str) -> str | None:
        """Return a body with this mistake in it, or None if it has no place there."""
        for old, new in self.changes:
            if old not in body:
                return None
            body = body.replace(old, new)
        return body


ALONE = 'each weight is clipped on its own, which changes the direction; all gradients together are one vector'
STILL_A_SHARE = 'hidden scores are 0, and exp(0) = 1, so they still get a share; minus infinity gets none'
NOT_IN_PLACE = 'm and v are new tensors, and what the caller holds has not changed: update them in place'
GELU = '0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))'
VARIANCE = '((x - mean) ** 2).mean(dim=-1, keepdim=True)'
ATTEND = 'heads = [attend(q[h], k[h], v[h]) for h in range(self.n_head)]'
TWO_SUMS = 'x = x + self.attn(self.ln_1(x))\n        x = x + self.mlp(self.ln_2(x))'
NORMALISED = ('x = self.ln_1(x)\n        x = x + self.attn(x)\n'
              '        x = self.ln_2(x)\n        x = x + self.mlp(x)')
ALL_CLIPPED = '[g * min(1.0, limit / (length + 1e-6)) for g in gradients]'
LENGTH = 'math.sqrt(sum((g**2).sum().item() for g in gradients))'
NATS = '(log_sum - chosen).mean()'

MISTAKES: dict[str, list[Mistake]] = {
    'merge': [
        Mistake('after a merge, the second half of the pair is still there: a pair takes two ids away',
                ('i += 2', 'i += 1')),
        Mistake('only the left half is compared: whatever follows it is swallowed',
                ('and (ids[i], ids[i + 1]) == pair', 'and ids[i] == pair[0]')),
        Mistake('(1, 2) and (2, 1) are different pairs: order counts',
                ('and (ids[i], ids[i + 1]) == pair', 'and {ids[i], ids[i + 1]} == set(pair)')),
        Mistake('the last pair of the text is never merged', ('i + 1 < len(ids)', 'i + 2 < len(ids)')),
        Mistake('the last id is lost, unless it is the right half of a pair',
                ('while i < len(ids):', 'while i < len(ids) - 1:')),
        Mistake('only the first pair is merged: continue after it',
                ('            i += 2\n', '            return merged + ids[i + 2:]\n')),
        Mistake('the pair stays, and the new token is put behind it: replace the pair',
                ('merged.append(new)', 'merged += [*pair, new]')),
    ],
    'most_frequent_pair': [
        Mistake('a word counts once, however often the text has it', ('+= count', '+= 1')),
        Mistake('this is the rarest pair', ('(-counts[pair], pair)', '(counts[pair], pair)')),
        Mistake('of equally frequent pairs, this takes the largest; the smallest is asked for',
                ('(-counts[pair], pair)', '(-counts[pair], -pair[0], -pair[1])')),
        Mistake('of equally frequent pairs, this takes the one that was met first; the smallest is asked for',
                ('(-counts[pair], pair)', '-counts[pair]')),
        Mistake('a pair that a word holds twice is counted once', ('pairwise(word)', 'set(pairwise(word))')),
        Mistake('a long word counts more than a short one that the text has as often',
                ('+= count', '+= count * len(word)')),
        Mistake('of equally frequent pairs, the one with the smallest sum is taken; the smallest pair is asked for',
                ('(-counts[pair], pair)', '(-counts[pair], sum(pair))')),
    ],
    'encode': [
        Mistake('merges must be done in the order in which they were learned: the later ones are made of the earlier',
                ('enumerate(merges)', 'reversed(list(enumerate(merges)))')),
        Mistake('merge number i makes token 256 + i: these are one too low', ('256 + i', '255 + i')),
        Mistake('merge number i makes token 256 + i: these are one too high', ('256 + i', '257 + i')),
        Mistake('merge number i makes token 256 + i: the 256 bytes come first', ('256 + i', 'i')),
        Mistake('only the first merge is done', ('enumerate(merges)', 'enumerate(merges[:1])')),
        Mistake('these are the bytes: nothing is merged', ('word = merge(word, pair, 256 + i)', 'pass')),
    ],
    'GPT.generate': [
        Mistake('the prediction of the first position is taken; what comes next is predicted at the last',
                ('logits[:, -1]', 'logits[:, 0]')),
        Mistake('if the text is longer than a block, the model reads its end, not its beginning',
                ('idx[:, -self.config.block_size:]', 'idx[:, :self.config.block_size]')),
        Mistake('this is always the likeliest token: one is to be drawn by its probability', (
            '(sums < drawn * sums[:, -1:]).sum(dim=-1, keepdim=True)', 'logits[:, -1].argmax(dim=-1, keepdim=True)')),
        Mistake('the new token is put in front', ('[idx, token]', '[token, idx]')),
        Mistake('the number of the new token is always 0, so that each position draws the same number',
                ('draw(seed, row, number)', 'draw(seed, row, 0)')),
        Mistake('all rows draw the same number: row is missing', ('draw(seed, row, number)', 'draw(seed, 0, number)')),
    ],
    'cross_entropy': [
        Mistake('this is the sum; the mean is asked for, so that the loss does not depend on how many tokens there are',
                ('.mean()', '.sum()')),
        Mistake('exp of a large logit is infinite: subtract the largest first, and add it again after the logarithm',
                ('highest + torch.log(torch.exp(logits - highest[..., None])', 'torch.log(torch.exp(logits)')),
        Mistake('exp of a large logit is infinite, and infinite / infinite is nan: subtract the largest first',
                (NATS, '-torch.log(torch.exp(chosen) / torch.exp(logits).sum(dim=-1)).mean()')),
        Mistake("the largest of all logits is subtracted, and exp of rows far below it is 0: take each row's own",
                ('logits.max(dim=-1).values', 'logits.max().expand(targets.shape)')),
        Mistake('the logarithm of a probability that rounds to 0 is infinite: take the logarithm of the sum, not of '
                'the probability', (NATS, '-torch.log(torch.exp(chosen - log_sum)).mean()')),
        Mistake('the largest logit was subtracted, and never added again', ('highest + torch.log', 'torch.log')),
        Mistake('the sign is wrong: this is the log-likelihood, and its negative is the loss',
                ('log_sum - chosen', 'chosen - log_sum')),
        Mistake('these are bits; nats are asked for', (NATS, '((log_sum - chosen) / math.log(2)).mean()')),
        Mistake('this is minus the probability; the loss is minus its logarithm',
                (NATS, '(-torch.exp(chosen - log_sum)).mean()')),
        Mistake('this is the logarithm of the mean probability; the mean of the logarithms is asked for',
                (NATS, '-torch.log(torch.exp(chosen - log_sum).mean())')),
        Mistake('softmax runs over the tokens; for each token it should run over the vocabulary, dim=-1', (
            NATS, '-torch.log_softmax(logits, 1).gather(-1, targets[..., None]).mean()')),
    ],
    'gradient_of_cross_entropy': [
        Mistake('this is the gradient of the sum of the losses; divide by the number of tokens',
                (' / targets.numel()', '')),
        Mistake('the sign is wrong: a larger logit of the token that came makes the loss smaller',
                ('softmax(logits) - came', 'came - softmax(logits)')),
        Mistake('this is what the model expected; subtract what came', ('softmax(logits) - came', 'softmax(logits)')),
        Mistake('divided by the number of logits; the mean is over tokens', ('targets.numel()', 'logits.numel()')),
        Mistake('divided by the number of sequences; the mean is over all their tokens',
                ('targets.numel()', 'len(targets)')),
        Mistake('p (1 - p) is the derivative of a sigmoid; of a softmax with its loss it is p less what came',
                ('softmax(logits) - came', 'softmax(logits) * (1 - softmax(logits))')),
    ],
    'softmax': [
        Mistake('exp(1000) is infinite, and infinite / infinite is nan: subtract the largest number first, which '
                'changes nothing else', ('torch.exp(x - x.max(dim=-1, keepdim=True).values)', 'torch.exp(x)')),
        Mistake('all numbers together have sum 1; each row should have it: sum along the last dimension',
                ('x.sum(dim=-1, keepdim=True)', 'x.sum()')),
        Mistake('columns have sum 1, not rows: the last dimension is dim=-1',
                ('x.sum(dim=-1, keepdim=True)', 'x.sum(dim=-2, keepdim=True)')),
        Mistake('sums run over the first dimension, that of the sequences: the last dimension is dim=-1',
                ('x.sum(dim=-1, keepdim=True)', 'x.sum(dim=0, keepdim=True)')),
        Mistake('their sum is not 1 yet: divide by it', ('x / x.sum(dim=-1, keepdim=True)', 'x')),
        Mistake('these are logarithms of probabilities',
                ('x / x.sum(dim=-1, keepdim=True)', 'torch.log(x / x.sum(dim=-1, keepdim=True))')),
        Mistake("the largest of all numbers is subtracted, and rows far below it become 0 / 0: take each row's own",
                ('x.max(dim=-1, keepdim=True).values', 'x.max()')),
    ],
    'gelu': [
        Mistake('this is the exact GELU; GPT-2 was trained with the tanh formula, and the two differ a little',
                (GELU, '0.5 * x * (1 + torch.erf(x / math.sqrt(2)))')),
        Mistake('this is ReLU: its negative side is flat, and nothing is learned there', (GELU, 'torch.relu(x)')),
        Mistake('this is the sigmoid approximation of GELU; GPT-2 has the tanh one',
                (GELU, 'x * torch.sigmoid(1.702 * x)')),
        Mistake('this is SiLU, a relative of GELU', (GELU, 'x * torch.sigmoid(x)')),
        Mistake('twice too large: half of x times 1 + tanh, which goes up to 2', ('0.5 * x', 'x')),
        Mistake('it is the root of 2 / pi, not 2 / pi', ('math.sqrt(2 / math.pi)', '2 / math.pi')),
        Mistake('it is the cube of x, not its square', ('x**3', 'x**2')),
        Mistake('the cube is of x alone, not of 0.044715 x', ('0.044715 * x**3', '(0.044715 * x) ** 3')),
        Mistake('1 + is missing before tanh, so that negative numbers pass as positive ones', ('(1 + torch', '(torch')),
    ],
    'LayerNorm.forward': [
        Mistake('the 1e-5 belongs under the root: outside it, tokens whose channels hardly differ are blown up',
                ('torch.sqrt(variance + 1e-5)', '(torch.sqrt(variance) + 1e-5)')),
        Mistake('the 1e-5 is missing: if all channels are equal, this divides by 0', ('variance + 1e-5', 'variance')),
        Mistake('divided by the variance; its root has the unit of x',
                ('torch.sqrt(variance + 1e-5)', '(variance + 1e-5)')),
        Mistake('the mean is not subtracted from x', ('(x - mean) / torch', 'x / torch')),
        Mistake('the variance divides by C - 1, as torch.var and torch.std do unless told otherwise; LayerNorm divides '
                'by C', (VARIANCE, 'x.var(dim=-1, keepdim=True)')),
        Mistake('this is the mean square, as in RMSNorm: subtract the mean first',
                (VARIANCE, '(x ** 2).mean(dim=-1, keepdim=True)')),
        Mistake('the learned gain, self.weight, is not used', (' * self.weight', '')),
        Mistake('the learned bias is not added', ('x if self.bias is None else x + self.bias', 'x')),
        Mistake('mean and variance run over the tokens: each token is normalised on its own, or the future leaks into '
                'the past', ('dim=-1, keepdim=True', 'dim=1, keepdim=True')),
        Mistake('mean and variance run over the whole batch: each token is normalised on its own',
                ('dim=-1, keepdim=True', 'dim=(0, 1, 2), keepdim=True')),
        Mistake('mean and variance run over all tokens of a sequence: each token is normalised on its own, or the '
                'future leaks into the past', ('dim=-1, keepdim=True', 'dim=(1, 2), keepdim=True')),
    ],
    'Attention.forward': [
        Mistake('c_proj is missing: the heads stand side by side, and nothing mixes them',
                ('return self.c_proj(y)', 'return y')),
        Mistake('GPT-2 keeps q, k, v in this order; here it is k, q, v',
                ('q, k, v = self.c_attn', 'k, q, v = self.c_attn')),
        Mistake('GPT-2 keeps q, k, v in this order; here it is v, k, q',
                ('q, k, v = self.c_attn', 'v, k, q = self.c_attn')),
        Mistake('GPT-2 keeps q, k, v in this order; here it is q, v, k',
                ('q, k, v = self.c_attn', 'q, v, k = self.c_attn')),
        Mistake('the channels of the heads are interleaved: head 0 comes first, whole, then head 1',
                ('torch.cat(heads, dim=-1)', 'torch.stack(heads, dim=-1).flatten(2)')),
        Mistake('this is one wide head: cut q, k and v into n_head parts first',
                (ATTEND, 'heads = [attend(*(torch.cat(list(z), dim=-1) for z in (q, k, v)))]')),
        Mistake('a head takes neighbouring channels, not every n-th', (
            '(z.chunk(self.n_head, dim=-1) for z in (q, k, v))',
            '([z[..., h::self.n_head] for h in range(self.n_head)] for z in (q, k, v))')),
        Mistake('all heads are head 0', ('attend(q[h], k[h], v[h])', 'attend(q[0], k[0], v[0])')),
        Mistake('view(B, H, T, D) mixes tokens with channels: view(B, T, H, D) cuts the channels, and transpose(1, 2) '
                'then exchanges two dimensions', (
                    '(z.chunk(self.n_head, dim=-1) for z in (q, k, v))',
                    '(z.reshape(len(x), self.n_head, x.size(1), -1).unbind(1) for z in (q, k, v))')),
    ],
    'attend': [
        Mistake('row t looks at token t + 1, the one it should predict: the mask is shifted by one',
                ('.tril()', '.tril(1)')),
        Mistake('row t does not see token t itself: the mask is shifted by one (and row 0 sees nothing: nan)',
                ('.tril()', '.tril(-1)')),
        Mistake('the mask is upside down: each token sees the future, and not the past', ('.tril()', '.triu()')),
        Mistake('nothing is hidden: each token looks at those after it, too, and so reads the answer',
                ('scores.masked_fill(~may_look, -math.inf)', 'scores')),
        Mistake('the mask hides what it should show, and shows what it should hide', ('~may_look', 'may_look')),
        Mistake(STILL_A_SHARE, ('-math.inf', '0.0')),
        Mistake('scores are not divided by sqrt(D): sums of D products grow with D, and softmax then sees one winner',
                ('scores / math.sqrt(D)', 'scores')),
        Mistake('the scores are divided by sqrt(D), before the softmax; here the result is',
                ('scores / math.sqrt(D)', 'scores'), ('@ v', '@ v / math.sqrt(D)')),
        Mistake('divided by D, not by its root', ('math.sqrt(D)', 'D')),
        Mistake('multiplied by sqrt(D), not divided', ('scores / math.sqrt(D)', 'scores * math.sqrt(D)')),
        Mistake('divided by the root of T, the number of tokens; it is D, the width of a head, that makes sums large',
                ('math.sqrt(D)', 'math.sqrt(T)')),
        Mistake('keys ask and queries answer: rows are queries, so it is q @ k^T',
                ('q @ k.transpose(1, 2)', 'k @ q.transpose(1, 2)')),
        Mistake('softmax runs over the queries; for each query it should run over the keys',
                ('softmax(scores)', 'softmax(scores.transpose(1, 2)).transpose(1, 2)')),
        Mistake('softmax runs over the sequences of the batch; for each query it should run over the keys, dim=-1',
                ('softmax(scores)', 'softmax(scores.transpose(0, 2)).transpose(0, 2)')),
        Mistake('the table is applied transposed', ('softmax(scores) @ v', 'softmax(scores).transpose(1, 2) @ v')),
        Mistake('scores are no probabilities yet: a softmax is missing',
                ('softmax(scores) @ v', 'scores.masked_fill(~may_look, 0.0) @ v')),
        Mistake('the keys are mixed; it should be the values', ('softmax(scores) @ v', 'softmax(scores) @ k')),
        Mistake('the mask comes after the softmax, so that what is left of a row no longer has sum 1', (
            'scores = scores.masked_fill(~may_look, -math.inf)', 'scores = scores'),
            ('softmax(scores) @ v', '(softmax(scores) * may_look) @ v')),
    ],
    'Block.forward': [
        Mistake('attention replaces the stream; it should add to it',
                ('x = x + self.attn(self.ln_1(x))', 'x = self.attn(self.ln_1(x))')),
        Mistake('the MLP replaces the stream; it should add to it',
                ('x = x + self.mlp(self.ln_2(x))', 'x = self.mlp(self.ln_2(x))')),
        Mistake('LayerNorm comes after attention; in GPT-2 it comes before',
                ('self.attn(self.ln_1(x))', 'self.ln_1(self.attn(x))')),
        Mistake('LayerNorm comes after the MLP; in GPT-2 it comes before',
                ('self.mlp(self.ln_2(x))', 'self.ln_2(self.mlp(x))')),
        Mistake('this is the order of the first Transformer (2017), LayerNorm after the sum; GPT-2 has it before '
                'attention and before the MLP', (
                    TWO_SUMS, 'x = self.ln_1(x + self.attn(x))\n        x = self.ln_2(x + self.mlp(x))')),
        Mistake('attention and MLP both read the old stream; in GPT-2 the MLP reads what attention has added',
                (TWO_SUMS, 'x = x + self.attn(self.ln_1(x)) + self.mlp(self.ln_2(x))')),
        Mistake('the MLP comes first; attention should', (
            TWO_SUMS, 'x = x + self.mlp(self.ln_2(x))\n        x = x + self.attn(self.ln_1(x))')),
        Mistake('ln_1 is used twice', ('self.ln_2(x)', 'self.ln_1(x)')),
        Mistake('attention reads the stream without LayerNorm', ('self.attn(self.ln_1(x))', 'self.attn(x)')),
        Mistake('the MLP reads the stream without LayerNorm', ('self.mlp(self.ln_2(x))', 'self.mlp(x)')),
        Mistake('what is added to is the normalised stream; it should be the stream itself', (
            TWO_SUMS, NORMALISED)),
    ],
    'GPT.init_weights': [
        Mistake('each layer adds twice, once in attention and once in the MLP: 2 n_layer',
                ('math.sqrt(2 * self.config.n_layer)', 'math.sqrt(self.config.n_layer)')),
        Mistake('c_proj is as large as the rest, so that the stream grows with every layer',
                (' / math.sqrt(2 * self.config.n_layer)', '')),
        Mistake('gains start at 1', ('p.fill_(1.0)', 'p.normal_(0.0, 0.02)')),
        Mistake('gains start at 1; these are 0, and let nothing pass', ('p.fill_(1.0)', 'p.zero_()')),
        Mistake('0.02 is the standard deviation; here it is taken for the variance, in all but c_proj',
                ('p.normal_(0.0, 0.02)', 'p.normal_(0.0, math.sqrt(0.02))')),
        Mistake('the standard deviation is 0.02; this is its square', ('0.02', '0.02 ** 2')),
        Mistake('biases start at 0', ('p.zero_()', 'p.normal_(0.0, 0.02)')),
        Mistake('divided by 2 n_layer, not by its root: it is variances that add up',
                ('math.sqrt(2 * self.config.n_layer)', '(2 * self.config.n_layer)')),
    ],
    'lr_at': [
        Mistake('step 0 has rate 0, and learns nothing: count from 1',
                ('(step + 1) / (warmup + 1)', 'step / warmup')),
        Mistake('the last warm-up step is at the peak already; the peak is for the step after it',
                ('(step + 1) / (warmup + 1)', '(step + 1) / warmup')),
        Mistake('it falls to 0, and not to the floor', ('floor + (peak - floor) * 0.5', 'peak * 0.5')),
        Mistake('half the height of the peak is added to the floor; it should be the distance between them',
                ('(peak - floor) * 0.5', 'peak * 0.5')),
        Mistake('after the last step the cosine rises again: stop at progress 1', (
            'min(1.0, (step - warmup) / max(1, total - warmup))', '(step - warmup) / max(1, total - warmup)')),
        Mistake('the fall begins at the end of the warm-up: measure progress from there',
                ('(step - warmup) / max(1, total - warmup)', 'step / total')),
        Mistake('progress is divided by all steps; the fall takes those after the warm-up',
                ('max(1, total - warmup)', 'total')),
        Mistake('this falls along a line; half a cosine is asked for',
                ('0.5 * (1 + math.cos(math.pi * progress))', '(1 - progress)')),
        Mistake('cosines take radians: half a turn is pi', ('math.cos(math.pi * progress)', 'math.cos(progress)')),
        Mistake('a cosine goes from 1 to -1; half of 1 + cos goes from 1 to 0', ('0.5 * (1 + ', '(')),
    ],
    'clip': [
        Mistake('a short gradient is made longer: clipping only shortens',
                ('min(1.0, limit / (length + 1e-6))', '(limit / (length + 1e-6))')),
        Mistake('each number is cut off on its own, which changes the direction; scale the whole vector',
                ('g * min(1.0, limit / (length + 1e-6))', 'g.clamp(-limit, limit)')),
        Mistake(ALONE, (ALL_CLIPPED, '[g * min(1.0, limit / (g.norm().item() + 1e-6)) for g in gradients]')),
        Mistake(ALONE, (ALL_CLIPPED, '[g * min(1.0, limit / g.norm().item()) for g in gradients]'),
                (LENGTH, 'sum(g.norm().item() for g in gradients)')),
        Mistake('this is the square of the length', ('math.sqrt(sum', '(sum')),
        Mistake('lengths do not add up; the length of all is the root of the sum of all squares',
                (LENGTH, 'sum(g.norm().item() for g in gradients)')),
        Mistake('the length is a root of a sum of squares, not a sum of sizes', ('(g**2).sum()', 'g.abs().sum()')),
        Mistake('the 1e-6 is added to the square of the length; it is added to the length itself',
                ('for g in gradients))', 'for g in gradients) + 1e-6)'), ('length + 1e-6', 'length')),
        Mistake('the 1e-6 is missing, with which PyTorch keeps a length of 0 from dividing', (' + 1e-6', '')),
        Mistake('the gradients are as they were: return the shortened ones', (ALL_CLIPPED, 'list(gradients)')),
    ],
    'adamw': [
        Mistake('the pull towards zero is not scaled by the learning rate',
                ('p -= lr * decay * p', 'p -= decay * p')),
        Mistake('nothing pulls the weights towards zero: the decay is missing', ('p -= lr * decay * p\n', 'pass\n')),
        Mistake(NOT_IN_PLACE, ('m += (1', 'm = m + (1'), ('v += (1', 'v = v + (1')),
        Mistake('the decay is a part of the gradient: that is Adam with L2, and AdamW keeps the two apart',
                ('    m += (1', '    g = g + decay * p\n    m += (1'), ('p -= lr * decay * p\n', 'pass\n')),
        Mistake('m starts at 0 and is too small at first: divide by 1 - beta1 ** (step + 1)',
                ('m / (1 - beta1 ** (step + 1))', 'm')),
        Mistake('v starts at 0 and is too small at first: divide by 1 - beta2 ** (step + 1)',
                ('v / (1 - beta2 ** (step + 1))', 'v')),
        Mistake('steps count from 0, so that the first divides by 0: the power is step + 1', ('(step + 1)', 'step')),
        Mistake('the 1e-8 stands outside the root: inside, it is 10,000 times as strong',
                ('torch.sqrt(v_hat) + 1e-8', 'torch.sqrt(v_hat + 1e-8)')),
        Mistake('divided by the mean square; its root has the unit of the gradient',
                ('torch.sqrt(v_hat) + 1e-8', 'v_hat + 1e-8')),
        Mistake('v is the mean of the square of the gradient', ('g**2 - v', 'g - v')),
        Mistake('beta1 is used for v, too', ('(1 - beta2) * (g', '(1 - beta1) * (g')),
        Mistake('the betas are exchanged: a mean keeps the share beta of itself, and takes 1 - beta of what is new',
                ('(1 - beta1) * (g', 'beta1 * (g'), ('(1 - beta2) * (g', 'beta2 * (g')),
        Mistake('this goes uphill: the loss falls against the gradient', ('p -= lr * m_hat', 'p += lr * m_hat')),
    ],
    'accumulate': [
        Mistake('the last part is smaller, and counts as much as the others: weight it by its windows', (
            'for gradients in gradients_of(model, parts, len(x)):',
            ('n = -(-len(x) // batch_size)\n    for a, b in parts:\n        gradients = torch.autograd.grad('
             'model(a, b)[1] / n, list(model.parameters()))'))),
        Mistake('gradients of means add up to too much: weight each part by its share of the windows', (
            'for gradients in gradients_of(model, parts, len(x)):',
            'for a, b in parts:\n        gradients = torch.autograd.grad(model(a, b)[1], list(model.parameters()))')),
        Mistake('each part overwrites what came before it: add', (
            'total = [so_far + g for so_far, g in zip(total, gradients, strict=True)]', 'total = gradients')),
        Mistake('the last part is left out if it is smaller', (
            'zip(x.split(batch_size), y.split(batch_size), strict=True)',
            'zip(x[:len(x) // batch_size * batch_size].split(batch_size), y.split(batch_size))')),
        Mistake('the share is of batch_size windows; it should be of all', (
            'gradients_of(model, parts, len(x))', 'gradients_of(model, parts, batch_size)')),
    ],
    'reduce_scatter': [
        Mistake('this is the mean; the sum is asked for',
                ('return [held[machine][machine]', 'return [held[machine][machine] / n')),
        Mistake('each machine has its own piece only: a ring needs n - 1 turns', ('range(n - 1)', 'range(0)')),
        Mistake('a neighbour overwrites its own piece: it should add what it is sent', (
            'held[neighbour][piece] + held[machine][piece]', 'held[machine][piece]')),
        Mistake('machine i holds piece i + 1 in the end: start the ring one piece earlier', (
            '(machine - turn - 1) % n', '(machine - turn) % n'), (
            'held[machine][machine]', 'held[machine][(machine + 1) % n]')),
        Mistake('all machines have piece 0 of the sum: machine i gets piece i', (
            'held[machine][machine]', 'held[0][0]')),
    ],
    'data_parallel': [
        Mistake('machines with fewer windows count as much as the others: weight each by its windows', (
            'list(gradients_of(model, parts, len(x)))',
            '[torch.autograd.grad(model(a, b)[1] / n_machines, list(model.parameters())) for a, b in parts]')),
        Mistake('gradients of means add up to n_machines times too much: weight each by its share of the windows', (
            'list(gradients_of(model, parts, len(x)))',
            '[torch.autograd.grad(model(a, b)[1], list(model.parameters())) for a, b in parts]')),
        Mistake('each machine has the gradient of its own windows only: nothing is exchanged', (
            'all_reduce(list(of_weight))', 'list(of_weight)')),
        Mistake('the lists are the wrong way round: [machine][weight] is asked for, and this is [weight][machine]', (
            '[list(of_machine) for of_machine in zip(*of_weights, strict=True)]', 'of_weights')),
    ],
    'zero1': [
        Mistake('the owners do not send what they have updated: the others keep old weights',
                ('weights[machine][i].copy_(weights[owner][i])', 'pass')),
        Mistake('only machine 0 gets what the owners have updated',
                ('for machine in range(n)', 'for machine in range(1)')),
        Mistake('step is one too high: adamw counts from 0 itself', ('m, v, step,', 'm, v, step + 1,')),
        Mistake('all machines get the weight from machine 0, which owns only some',
                ('copy_(weights[owner][i])', 'copy_(weights[0][i])')),
        Mistake('weights are not pulled towards zero: decay is not passed on', ('lr, decay)', 'lr, 0.0)')),
    ],
    'Cache.extend': [
        Mistake('the length is not moved on, so that each token takes the place of the one before it', (
            'self.length += k.size(2)', 'self.length = max(self.length, k.size(2))')),
        Mistake('only the new token comes back; attention needs all that came before it, too', (
            'return self.k[:, :, :self.length], self.v[:, :, :self.length]', 'return k, v')),
        Mistake('room that nothing has been written to comes back, too: only the first `length` places are real', (
            'return self.k[:, :, :self.length], self.v[:, :, :self.length]', 'return self.k, self.v'),
            ('new_empty', 'new_zeros')),
        Mistake('keys and values are exchanged', ('= k, v\n', '= v, k\n')),
        Mistake('if the room is full, the newest token is lost; it should take the place of the oldest', (
            '        self.k[:, :, new], self.v[:, :, new] = k, v\n',
            '        if self.length < self.room:\n            self.k[:, :, new], self.v[:, :, new] = k, v\n')),
        Mistake('if the room is full, the new token takes the place of the newest; it should be the oldest', (
            'first = self.length % self.room', 'first = min(self.length, self.room - 1)')),
    ],
    'choose': [
        Mistake('multiplied by the temperature: a high one should make the odds more even',
                ('logits / temperature', 'logits * temperature')),
        Mistake('the token that passes top_p is left out: keep the fewest that hold at least top_p, the one that '
                'passes it included', ('sums - p >= int', 'sums >= int')),
        Mistake('tokens are kept by their own probability; top_p is about the sum of the likeliest',
                ('sums - p >= int(top_p * ALL)', 'p < int((1 - top_p) * ALL)')),
        Mistake('these are places among the sorted tokens, and not the tokens that stand there',
                ('(drawn if ids is None else ids.gather(-1, drawn))', 'drawn')),
        Mistake('temperature 0 takes the likeliest token, not the least likely', ('logits.max(', 'logits.min(')),
        Mistake('top_k has no effect', ('min(top_k or V, V)', 'V')),
        Mistake('top_p has no effect', ('if top_p is not None:\n        beyond', 'if False:\n        beyond')),
        Mistake('top_p is of the probability of all tokens; it should be of what the top_k have', (
            'p = ((logits / temperature).softmax(dim=-1) * ALL).long()', 'p = (whole * ALL).long()'),
            ('V = None, logits', 'V, whole = None, logits'),
            ('.size(-1)\n', '.size(-1), (logits / temperature).softmax(-1)\n'),
            ('  logits, ids = ', '  whole = whole.topk(min(top_k or V, V))[0]\n        logits, ids = ')),
        Mistake('temperature has no effect', ('logits / temperature', 'logits / 1')),
    ],
}
