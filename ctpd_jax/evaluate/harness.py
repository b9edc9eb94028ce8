"""lm-eval asks a decoder of ours: `DecoderLM`, a model that lm-eval's `simple_evaluate` takes as it is.

Tokens, truncation and stop texts are those of lm-eval's own `hf` model. The work is not: what is asked of one context
lies in one row behind it, and only scored tokens meet the vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jinja2
import numpy as np
from jax.sharding import Mesh
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ctpd_jax.data import contexts
from ctpd_jax.errors import UserError
from ctpd_jax.models.attention_backends import choose_backend, platform_of, usual_dtype
from ctpd_jax.models.compute import Compute, scored_and_likeliest
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import Params
from ctpd_jax.models.hf import load_hf, model_directory
from ctpd_jax.models.sampling import generate
from ctpd_jax.schema import Array, Batch
from ctpd_jax.sharding import (
    check_heads,
    first_process,
    make_mesh,
    param_sharding,
    place_batch,
    row_devices,
    summed_over_processes,
)
from ctpd_jax.train.metrics import Progress

CPU_TOKENS = 1024  # of a batch that is scored: a CPU gains nothing from more, and loses by more padding
Request = tuple[Any, list[int], list[int]]  # what lm-eval knows it by, its context, its continuation


class DecoderLM(TemplateLM):
    """A model folder, or a model that is loaded already, as lm-eval asks it.

    Several processes each take their share of the batches and all return all answers: to lm-eval they are one.

    Args:
        folder: in Hugging Face format, or a hub id; its tokenizer is used in any case.
        batch_tokens: tokens of a batch, padding and room for answers included; of those that are scored on a CPU fewer.
        dtype: of the parameters and the products; None: bfloat16 on a TPU and a GPU that has it, else float32.
        mesh: of devices of this process, all by default; rows and parameters are spread over it.
        model: config and parameters, on that mesh, instead of those of the folder.
        seed: of drawn answers.

    Raises:
        UserError: the folder or its model cannot be read, or does not divide over the devices.
    """

    def __init__(
        self,
        folder: str | Path,
        batch_tokens: int = 8192,
        dtype: str | None = None,
        mesh: Mesh | None = None,
        model: tuple[DecoderConfig, Params] | None = None,
        seed: int = 1234,
    ) -> None:
        super().__init__()
        from transformers import AutoTokenizer

        # 1. Where, and how exactly.
        self.mesh = mesh or make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, jax.local_devices())
        self.platform = platform_of(self.mesh.devices.flat[0])
        dtype = dtype or usual_dtype(self.platform)
        self.batch_tokens, self.seed = batch_tokens, seed
        # 2. The model. Its tokenizer is opened by the class that lm-eval's `hf` opens it with.
        path = model_directory(folder)
        self.decoder, self.params = model or load_hf(path, dtype, param_sharding(self.mesh))
        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        # 3. How it attends: contexts are shared by their continuations.
        check_heads(self.mesh, self.decoder.num_heads, self.decoder.num_kv_heads, str(folder))
        backend = choose_backend("auto", self.decoder, dtype, True, self.platform)
        self.compute = Compute(dtype, attention=backend, mesh=self.mesh)

    # -------------------------------------------------------------------------------------------- text

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        return self.decoder.longest

    max_gen_toks = 256

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        # A chat template has written BOS already.
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        flags = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **flags)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        def render(history: list[dict[str, str]]) -> str:
            settings = {
                "add_generation_prompt": add_generation_prompt,
                "continue_final_message": not add_generation_prompt,
            }
            return self.tokenizer.apply_chat_template(history, tokenize=False, **settings)

        try:
            return render(chat_history)
        except jinja2.TemplateError:  # of a model that knows no system message
            return render([message for message in chat_history if message["role"] != "system"])

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes of the model beside the results."""
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return {"model_num_parameters": parameters, "model_dtype": self.compute.dtype}

    # -------------------------------------------------------------------------------------------- log-probabilities

    def _loglikelihood_tokens(self, requests: Sequence[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        """Returns each continuation's log-probability, and whether greedy decoding would write it."""
        # 1. Rows, and batches of a few shapes.
        questions = [request[1:] for request in requests]
        rows, devices = contexts.shared_rows(questions, self.max_length), row_devices(self.mesh)
        needs = [contexts.needs_of(row, questions) for row in rows]
        at_once = min(self.batch_tokens, CPU_TOKENS) if self.platform == "cpu" else self.batch_tokens
        batches = contexts.batches_by_length([tokens for tokens, _ in needs], at_once, devices)
        most: dict[int, int] = {}
        for _, length, places in batches:
            most[length] = max(most.get(length, 0), *(needs[place][1] for place in places))
        # 2. Each question's sum, and how many of its tokens are not the likeliest: a process fills in its own.
        found = np.zeros((len(questions), 2))
        with Progress(len(questions), "log-likelihoods", unit="question", active=first_process()) as progress:
            for count, length, places in batches[jax.process_index() :: jax.process_count()]:
                shape = count, length, contexts.bucket(most[length], 8)
                batch = contexts.build_rows([rows[place] for place in places], questions, shape)
                logps, likeliest = _read(self.decoder, self.compute, self.params, place_batch(self.mesh, batch))
                values, real = np.stack([np.asarray(logps), ~np.asarray(likeliest)], axis=-1), batch.pair >= 0
                np.add.at(found, batch.pair[real], values[real])
                progress.update(len(np.unique(batch.pair[real])))
        return [(float(total), not missed) for total, missed in summed_over_processes(found)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [total for total, _ in self._loglikelihood_tokens(windows)]
        return np.bincount(np.array(owners, int), totals, len(requests)).tolist()

    # -------------------------------------------------------------------------------------------- answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        # Requests of the same settings are answered together.
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[repr(sorted(request.args[1].items()))].append(number)
        answers: dict[int, str] = {}
        with Progress(len(requests), "answers", unit="answer", active=first_process()) as progress:
            for numbers in alike.values():
                texts = [requests[number].args[0] for number in numbers]
                answers |= zip(numbers, self._answers(texts, requests[numbers[0]].args[1], progress))
        return [answers[number] for number in range(len(requests))]

    def _answers(self, texts: Sequence[str], asked: dict[str, Any], progress: Progress) -> list[str]:
        # 1. What the task asks for.
        settings: dict[str, Any] = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
        until, room, draw = [settings.pop(name) for name in ("until", "max_gen_toks", "do_sample")]
        drawn = {name: settings.pop(name) for name in ("temperature", "top_k", "top_p") if name in settings}
        if unknown := {name for name, value in settings.items() if (name, value) != ("num_beams", 1)}:
            raise UserError(
                f"A task asks for answers with {', '.join(sorted(unknown))}; here it can ask for until, max_gen_toks, "
                "do_sample, temperature, top_k and top_p."
            )
        if room >= self.max_length:
            raise UserError(f"A task asks for answers of {room} tokens; the model has {self.max_length} positions.")

        # 2. Contexts that leave room for the answer, cut on the left.
        prompts = [self.tok_encode(text)[room - self.max_length :] for text in texts]
        batches = contexts.batches_by_length([len(prompt) for prompt in prompts], self.batch_tokens, room=room)

        # 3. Token ids plus one, int32 [requests, room]: 0 is none, and a process fills in its own.
        found, key = np.zeros((len(prompts), room), np.int32), jax.random.key(self.seed)
        stops = [stop for stop in until if stop]
        for number in range(jax.process_index(), len(batches), jax.process_count()):
            _, length, places = batches[number]
            own = generate(
                self.decoder,
                self.params,
                [prompts[place] for place in places],
                room,
                **(drawn if draw else {}),
                key=jax.random.fold_in(key, number),
                stop_ids=(self.eot_token_id, *self.decoder.eos_ids),
                stop_strings=stops,
                decode=self.tokenizer.decode if stops else None,
                compute_dtype=self.compute.dtype,
                prompt_room=length,
            )
            for place, ids in zip(places, own):
                found[place, : len(ids)] = np.array(ids, np.int32) + 1
            progress.update(len(places))

        # 4. Text, up to the first stop. The end of text may also be spelled out.
        stops.append(self.tokenizer.decode(self.eot_token_id))
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        written = [decode(row[row > 0] - 1) for row in summed_over_processes(found)]
        return [postprocess_generated_text(text, stops, None) for text in written]


# ---------------------------------------------------------------------------------------- one program


@partial(jax.jit, static_argnums=(0, 1))
def _read(decoder: DecoderConfig, compute: Compute, params: Params, batch: Batch) -> tuple[Array, Array]:
    return scored_and_likeliest(decoder, params, batch, compute)
