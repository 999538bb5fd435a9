"""The command `mpo-run serve`; its modules are imported when it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mpo_runtime.cli.options import File, Loading, grouped


@dataclass(frozen=True, slots=True)
class Access:
    """Where the server listens, and who may use it."""

    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="The port; 0 takes a free one.")] = 8080
    api_key: Annotated[
        str | None, typer.Option(envvar="MPO_API_KEY", help="A key that every request must have.", show_default=False)
    ] = None
    api_key_file: Annotated[Path | None, typer.Option(help="A file of keys, one a line.", show_default=False)] = None
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow an address that others reach, without a key.")] = (
        False
    )
    cors: Annotated[
        list[str] | None,
        typer.Option(help="A web page's origin that may use the server; may be repeated.", show_default=False),
    ] = None


@dataclass(frozen=True, slots=True)
class Places:
    """How many requests at the same time, how long, and what is kept of them."""

    parallel: Annotated[int, typer.Option(help="Texts that are generated at the same time.")] = 8
    max_queue: Annotated[int, typer.Option(help="Texts that may wait; beyond them the answer is 503.")] = 64
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 600.0
    cache_ram: Annotated[
        int | None,
        typer.Option(help="MB of prompts that are kept for later requests.", show_default="one whole context"),
    ] = None
    slot_save_path: Annotated[
        Path | None, typer.Option(help="A folder in which clients may save prompt caches.", show_default=False)
    ] = None


@grouped
def serve(
    file: File,
    *,
    alias: Annotated[str | None, typer.Option(help="The model's name for clients.", show_default="the file's")] = None,
    access: Access,
    places: Places,
    loading: Loading,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log a line for every request, with its prompt.")
    ] = False,
) -> None:
    """Serve a model to OpenAI's clients and to browsers.

    The page is at the address that is printed. Ctrl-C or SIGTERM lets running requests end; a second one ends at once.
    """
    try:
        from mpo_server.run import run
    except ModuleNotFoundError as error:
        from mpo_formats.errors import ConfigError

        raise ConfigError(f"serve: needs the library {error.name}; install mpo-runtime[serve]") from None
    from mpo_server.settings import Settings, read_keys

    kept = None if places.cache_ram is None else places.cache_ram * 1_000_000
    settings = Settings(
        file=file,
        host=access.host,
        port=access.port,
        alias=alias,
        keys=read_keys(access.api_key, access.api_key_file),
        insecure=access.insecure,
        parallel=places.parallel,
        max_queue=places.max_queue,
        origins=tuple(access.cors or ()),
        timeout=places.timeout,
        slot_path=places.slot_save_path,
        verbose=verbose,
        loading={**loading.arguments(), "parallel": places.parallel, "prefix_bytes": kept},
    )
    run(settings)
