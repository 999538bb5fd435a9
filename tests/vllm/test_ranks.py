"""Two processes that talk by gloo hold the shares of vLLM's layers: together they give what the unsplit layers give."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing

from mpo_formats.architecture import EMBEDDING
from mpo_runtime.weights.vllm_folder import quantization_config
from tests.vllm.cases import BLOCK, DOWN, ENVIRONMENT, GATE, KEY, QUERY, UP, VALUE, close, layers, load, reference

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm runs these tests in .venv-vllm")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1800)]
RANKS = 2


def rank_of_two(rank: int, folder: str, transformed: bool) -> None:
    """One of the processes; leaves a file where all layers gave what they should."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment

    # vLLM's executor names its shared memory by the last of these.
    os.environ |= ENVIRONMENT | {"MPO_THREADS": "1", "VLLM_DIST_IDENT": Path(folder).name}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    import mpo_vllm

    mpo_vllm.register()
    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        init_distributed_environment(RANKS, rank, f"file://{folder}/gloo", rank, "gloo")
        ensure_model_parallel_initialized(RANKS, 1)
        attention(rank, transformed)
        gated_mlp(rank, transformed)
        table_and_head(transformed)
    Path(folder, f"rank{rank}").touch()


def ready(layer: Any, *parts: tuple[str, Any], transformed: bool) -> Any:
    """A layer of vLLM with the tensors of ours, as its loader leaves it."""
    own = layers(transformed)
    for name, shard in parts:
        load(layer, own[name], shard)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def config(transformed: bool) -> Any:
    """The plugin's configuration of all layers."""
    from mpo_vllm.plugin import MpoConfig

    return MpoConfig.from_config(quantization_config(one.spec for one in layers(transformed).values()))


def matrix(name: str, transformed: bool) -> Tensor:
    """The whole matrix of one of our layers."""
    return reference(layers(transformed)[name])


def attention(rank: int, transformed: bool) -> None:
    """Queries, keys and values: each rank has its half of the rows of all three."""
    from vllm.model_executor.layers.linear import QKVParallelLinear

    made = QKVParallelLinear(
        64, 16, 4, 2, bias=False, quant_config=config(transformed), prefix=f"{BLOCK}.self_attn.qkv_proj"
    )
    layer = ready(made, (QUERY, "q"), (KEY, "k"), (VALUE, "v"), transformed=transformed)
    x = torch.randn(7, 64)
    halves = [matrix(name, transformed).chunk(RANKS)[rank] for name in (QUERY, KEY, VALUE)]
    close(layer(x)[0], x @ torch.cat(halves).T)


def gated_mlp(rank: int, transformed: bool) -> None:
    """Gate and up are cut by rows, down by columns; its layer adds the parts of all ranks up."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear

    made = MergedColumnParallelLinear(
        64, [96, 96], bias=False, quant_config=config(transformed), prefix=f"{BLOCK}.mlp.gate_up_proj"
    )
    first = ready(made, (GATE, 0), (UP, 1), transformed=transformed)
    down = RowParallelLinear(96, 64, bias=False, quant_config=config(transformed), prefix=DOWN)
    last = ready(down, (DOWN, None), transformed=transformed)
    x = torch.randn(7, 64)
    gate, up = (x @ matrix(name, transformed).T for name in (GATE, UP))
    found_gate, found_up = first(x)[0].chunk(2, dim=1)
    half = 96 // RANKS
    close(torch.cat([found_gate, found_up], 1), torch.cat([one[:, rank * half :][:, :half] for one in (gate, up)], 1))
    close(last(torch.tanh(found_gate) * found_up)[0], (torch.tanh(gate) * up) @ matrix(DOWN, transformed).T)


def table_and_head(transformed: bool) -> None:
    """The second rank's half of the vocabulary ends in padding; a head that is tied gives each rank its half of the logits."""
    from vllm.distributed import tensor_model_parallel_all_gather
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    table = VocabParallelEmbedding(100, 64, quant_config=config(transformed))
    head = ParallelLMHead(100, 64, quant_config=config(transformed), prefix="lm_head").tie_weights(table)
    ready(table, (EMBEDDING, None), transformed=transformed)
    head.quant_method.process_weights_after_loading(head)
    whole = matrix(EMBEDDING, transformed)
    ids = torch.tensor([[3, 99], [0, 64], [63, 3]])
    close(table(ids), whole[ids])
    x = torch.randn(7, 64)
    logits = tensor_model_parallel_all_gather(head.quant_method.apply(head, x, None))
    close(logits[:, :100], x @ whole.T)


@pytest.mark.parametrize("transformed", [False, True], ids=["as they are", "transformed"])
def test_two_ranks_give_what_the_unsplit_layers_give(tmp_path: Path, transformed: bool) -> None:
    multiprocessing.spawn(rank_of_two, (str(tmp_path), transformed), nprocs=RANKS)
    assert sorted(path.name for path in tmp_path.glob("rank*")) == ["rank0", "rank1"]
