"""CTPD on one page: a small student learns from a teacher whose tokenizer cuts text elsewhere.

    python examples/ctpd_one_page.py TEACHER STUDENT      # two model folders, or hub ids

Everything is here but scale: for your data, packing, checkpoints and TPUs there is `ctpd run` (README.md).
Letters: N = 2 B responses, the chosen ones first; L row length, T tokens of a response, S spans of a response.
"""

import sys

import jax
import jax.numpy as jnp
import optax

import ctpd_jax as ctpd

PAIRS = [  # prompt, chosen, rejected
    ("How do I boil an egg?", "Seven minutes in boiling water, then cold water.", "Eggs? Look it up yourself."),
    ("What is a good gift for my niece?", "Perhaps a book about the stars, or crayons.", "Who cares, take anything."),
    ("I lost my keys. Any advice?", "Retrace your steps, and check yesterday's coat.", "You are hopeless, as usual."),
    ("Why is the sky blue?", "Air scatters blue light more than red light.", "Because it is not green, obviously."),
]
GOOD, BAD = "Answer helpfully and politely. ", "Answer rudely, and be of no help. "


def padded(rows, fill):
    """Ragged rows -> int32 [N, longest], `fill` behind each."""
    longest = max(map(len, rows))
    return jnp.array([[*map(int, row), *[fill] * (longest - len(row))] for row in rows], jnp.int32)


def rows_of(text, prompts, sides):
    """What a model reads: tokens [N, L], the place before each response token [N, T], the token itself, its span."""
    prompt_ids = [text.prompt([ctpd.Message("user", prompt)]) for prompt in prompts]
    tokens = padded([[*prompt, *side.ids] for prompt, side in zip(prompt_ids, sides)], 0)
    before = padded([range(len(p) - 1, len(p) - 1 + len(side.ids)) for p, side in zip(prompt_ids, sides)], 0)
    return tokens, before, padded([side.ids for side in sides], 0), padded([side.span_ids for side in sides], -1)


def span_logps(config, params, rows, num_spans):
    """log pi(span | prompt, text before it), float32 [N, S]. No [N, L, vocabulary] is ever held."""
    tokens, before, targets, span_ids = rows
    hidden = ctpd.hidden_states(config, params, tokens)  # [N, L, D]
    hidden = jnp.take_along_axis(hidden, before[..., None], axis=1)  # [N, T, D]: each state predicts what follows it
    logps = ctpd.token_logprobs(hidden, ctpd.unembedding(config, params), targets, softcap=config.final_softcap)
    return ctpd.span_sums(logps, span_ids, num_spans)


def main(teacher_folder, student_folder, steps=10, learning_rate=5e-6, beta=0.1):
    teacher, student = ctpd.load_text_model(teacher_folder), ctpd.load_text_model(student_folder)
    teacher_config, teacher_params = ctpd.load_hf(teacher_folder)
    config, params = ctpd.load_hf(student_folder)

    # 1. Align: spans are what lies between two places where both tokenizers cut.
    prompts = 2 * [prompt for prompt, _, _ in PAIRS]
    responses = [chosen for _, chosen, _ in PAIRS] + [rejected for _, _, rejected in PAIRS]
    aligned = ctpd.align_batch(responses, teacher.tokenizer, student.tokenizer)
    num_spans = max(a.num_spans for a in aligned)
    real = jnp.arange(num_spans) < jnp.array([a.num_spans for a in aligned])[:, None]  # [N, S]

    # 2. The teacher reads everything once: as it is, which is the reference, and as the contrastive pair. Here two
    #    instructions make that pair; the paper trains it, by DPO and by DPO on swapped pairs.
    def read(instruction):
        rows = rows_of(teacher, [instruction + prompt for prompt in prompts], [a.teacher for a in aligned])
        return jax.jit(span_logps, static_argnums=(0, 3))(teacher_config, teacher_params, rows, num_spans)

    reference, positive, negative = read(""), read(GOOD), read(BAD)

    # 3. Weigh: a span counts as much as the contrastive pair differs about it; mu is its sign.
    mu = jnp.repeat(jnp.array([1.0, -1.0]), len(PAIRS))[:, None]
    weights = ctpd.importance_weights(positive, negative, mu=mu, mask=real)

    # 4. Train: DPO's objective over spans, the teacher as the reference. Nobody asks the teacher any more.
    rows = rows_of(student, prompts, [a.student for a in aligned])
    optimizer = optax.adam(learning_rate)

    def mean_loss(params):
        policy = span_logps(config, params, rows, num_spans)
        sides = [half for array in (policy, reference, weights) for half in jnp.split(array, 2)]
        out = ctpd.ctpd_loss(*sides, beta=beta)
        return out.loss.mean(), (out.chosen_rewards - out.rejected_rewards).mean()

    @jax.jit
    def update(params, state):
        (loss, margin), gradient = jax.value_and_grad(mean_loss, has_aux=True)(params)
        changes, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, changes), state, loss, margin

    state, losses = optimizer.init(params), []
    for step in range(steps):
        params, state, loss, margin = update(params, state)
        losses.append(float(loss))
        print(f"step {step:2d}   loss {loss:7.4f}   margin of the rewards {margin:+7.3f}")
    return losses


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
