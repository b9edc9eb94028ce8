"""`ctpd plan` in a process that has the compiler for TPUs; the exit code is the last line that it prints.

With "logits" instead of arguments it compiles what must not be: the logits of all positions of a small model.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # it runs as a script, and the helpers are a package
from ctpd_jax.plan.chips import devices_of, parse_topology, quiet_compiler

if sys.argv[1] != "logits":
    from ctpd_jax.cli import main
    from ctpd_jax.plan import command
    from helpers.compiled_text import contents

    make_plan = command.make_plan

    def told(*args):
        """The plan, after a line on what each of its programs holds."""
        plan = make_plan(*args)
        for program in plan.stage.programs:
            if plan.texts.get(program.name) and program.name != "update":
                print(f"  in {program.name}: {contents(plan.texts[program.name], program, plan.stage)}")
        return plan

    command.make_plan = told
    print(main(sys.argv[1:]))
else:
    quiet_compiler()
    import jax
    import jax.numpy as jnp

    from ctpd_jax.models.decoder import apply, param_shapes
    from ctpd_jax.models.hf.config import from_hf
    from ctpd_jax.sharding import make_mesh, replicated, shard_shapes
    from helpers.compiled_text import vocabulary_arrays

    config = from_hf(
        {
            "model_type": "llama",
            "vocab_size": 50_000,
            "hidden_size": 96,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
    )
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices_of(parse_topology("v5e:1x1")))
    tokens = jax.ShapeDtypeStruct((4, 256), jnp.int32, sharding=replicated(mesh))
    program = jax.jit(lambda params, tokens: apply(config, params, tokens))
    traced = program.trace(shard_shapes(mesh, param_shapes(config)), tokens)
    text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    print(vocabulary_arrays(text, config, mesh))
