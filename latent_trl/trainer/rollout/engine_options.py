"""TRL's fields of vLLM: which go together, and the addresses of rollout servers."""

from dataclasses import fields
from typing import Any
from urllib.parse import urlsplit

from ..run.health import check_choice
from .importance import MODES

VLLM_MODES = ("colocate", "server")
# What is of transformers' own generation, or trains what an engine holds fixed: the values that ask for nothing.
ENGINE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "train_backbone": (False,),
    "generation_kwargs": (None, {}),
    "repetition_penalty": (1.0,),
    "cache_implementation": (None,),
    "cuda_graphs": (None, False),
}
# Fields that are about one of the modes, besides those that begin with `vllm_server`.
COLOCATED = ("vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_enable_sleep_mode")
# TRL's default, an address that a server listens on and no client calls.
ANY_HOST = "0.0.0.0"


def check_engine_options(args: Any) -> None:
    """
    What an engine over codes cannot do, and what [`check_engine_fields`] finds.

    Args:
        args (`TrainingArguments`): The trainer's, with TRL's fields of vLLM and `vllm_server_hosts`.

    Raises:
        ValueError: With the field's name.
    """
    if args.use_vllm:
        for name, neutral in ENGINE_NEUTRAL.items():
            if getattr(args, name) not in neutral:
                raise ValueError(
                    f"`{name}={getattr(args, name)!r}` cannot be had with `use_vllm=True`. Leave one of them out."
                )
        check_choice("vllm_importance_sampling_mode", args.vllm_importance_sampling_mode, MODES)
    check_engine_fields(args)


def check_engine_fields(args: Any) -> None:
    """
    What of the fields of vLLM is about none, or about the other mode.

    Args:
        args (`TrainingArguments`): The trainer's, with fields of vLLM and `vllm_server_hosts`.

    Raises:
        ValueError: With the field's name.
    """
    defaults = {f.name: f.default for f in fields(args) if f.name.startswith("vllm_")}
    given = [name for name, default in defaults.items() if getattr(args, name) != default]
    if not args.use_vllm:
        if given:
            raise ValueError(f"`{given[0]}` is about vLLM. Set `use_vllm=True`, or leave it out.")
        return
    check_choice("vllm_mode", args.vllm_mode, VLLM_MODES)
    for name in given:
        if args.vllm_mode == "server" and name in COLOCATED:
            raise ValueError(
                f"`{name}={getattr(args, name)!r}` is about an engine in the trainer's process. With "
                "`vllm_mode='server'` give it to `latent-trl vllm-serve`."
            )
        if args.vllm_mode == "colocate" and name.startswith("vllm_server"):
            raise ValueError(f"`{name}` is about servers. Set `vllm_mode='server'`, or leave it out.")
    if args.vllm_mode == "server":
        server_urls(args)
        if not args.vllm_server_timeout > 0:
            raise ValueError(f"`vllm_server_timeout` must be positive seconds, got {args.vllm_server_timeout}.")


def server_urls(args: Any) -> list[str]:
    """
    The addresses of the rollout servers, such as `http://127.0.0.1:8000`.

    Raises:
        ValueError: For one that is none, one that is named twice, and servers that are named in two fields.
    """
    defaults = {f.name: f.default for f in fields(args)}
    named = ("vllm_server_hosts", "vllm_server_base_url", "vllm_server_host")
    given = [name for name in named if getattr(args, name) != defaults[name]]
    if len(given) > 1:
        raise ValueError(f"`{given[0]}` and `{given[1]}` both say where the servers are. Give one of them.")
    if args.vllm_server_base_url is not None and args.vllm_server_port != defaults["vllm_server_port"]:
        raise ValueError("`vllm_server_port` beside `vllm_server_base_url`: write the port into the address.")
    name = given[0] if given else "vllm_server_host"
    value = getattr(args, name)
    addresses = value if name == "vllm_server_hosts" else [value]
    if not isinstance(addresses, list | tuple) or not addresses:
        raise ValueError(f"`{name}` must be a list of addresses, got {value!r}.")
    urls = [_url(name, address, args.vllm_server_port) for address in addresses]
    twice = next((url for i, url in enumerate(urls) if url in urls[:i]), None)
    if twice is not None:
        raise ValueError(f"`{name}` names {twice} twice.")
    return urls


def _url(name: str, address: Any, port: int) -> str:
    has_scheme = "://" in str(address)
    text = str(address) if has_scheme else f"http://{address}"
    try:
        if not isinstance(address, str):
            raise TypeError("it is no text")
        parts = urlsplit(text)
        host, own_port = parts.hostname, parts.port
        extra = parts.path.rstrip("/") or parts.query or parts.fragment or parts.username
        if parts.scheme not in ("http", "https") or not host or extra:
            raise ValueError("scheme, host and port are all that it may have")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{name}`: {address!r} is no address of a server ({error}). Write `host:port` or `http://host:port`."
        ) from error
    host = "127.0.0.1" if host == ANY_HOST else f"[{host}]" if ":" in host else host
    if own_port is None and not has_scheme:
        own_port = port
    return f"{parts.scheme}://{host}" + ("" if own_port is None else f":{own_port}")
