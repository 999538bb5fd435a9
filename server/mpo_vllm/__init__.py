"""The plugin that lets vLLM serve folders of `mpo-export to-vllm`; vLLM finds it by the entry point `vllm.general_plugins`."""

from __future__ import annotations


def register() -> None:
    """Registers the quantisation method `mpo`; vLLM calls this in each of its processes, perhaps more than once."""
    from mpo_vllm.plugin import register_method

    register_method()
