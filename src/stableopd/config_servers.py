"""Rules for settings that name servers: a served teacher, and vLLM servers of rollouts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from stableopd.config import Config, TeacherConfig

__all__ = ["engine_rules", "key_fault", "teacher_rules", "tokenizer_source", "url_fault"]


def teacher_rules(config: Config) -> list[tuple[bool, str]]:
    """What is impossible about a served teacher.

    Args:
        config: The configuration.

    Returns:
        For each rule whether it is broken, and the sentence that says so.
    """
    o, t = config.objective, config.teacher
    is_served, whole = bool(t.url), "a server gives the log-probs of tokens, and not the teacher's "
    whole += "distribution over the whole vocabulary"
    faults = [
        (bool(url_fault(url)), f"{field}: {url_fault(url)}")
        for field, urls in {
            "teacher.url": t.url,
            **{f"teacher.by_name.{name}": urls for name, urls in t.by_name.items()},
        }.items()
        for url in urls or ("",) * (field != "teacher.url")
    ]
    return [
        *faults,
        (bool(key_fault(t.api_key_env)), f"teacher.api_key_env {key_fault(t.api_key_env)}"),
        (
            not is_served and bool(t.by_name or t.tokenizer or t.stop_ids or t.api_key_env),
            "teacher.by_name, tokenizer, stop_ids and api_key_env belong to a served teacher; "
            "give the default one's address in teacher.url, or leave them out.",
        ),
        (
            is_served and bool(t.gguf_file),
            "teacher.gguf_file is of a teacher in this process, but teacher.url names a server; "
            "leave one of the two out.",
        ),
        (
            is_served and o.baseline == "kl",
            f"objective.baseline = 'kl' and teacher.url: {whole}; leave the baseline out.",
        ),
        (
            is_served and bool(o.lambda_divergence) and not o.top_k,
            f"the divergence term and teacher.url: {whole}; set objective.top_k, and start vLLM "
            "with --max-logprobs at least as large.",
        ),
        (
            is_served and t.temperature != 1,
            f"teacher.temperature = {t.temperature:g} and teacher.url: {whole}, which another "
            "temperature would need; leave it at 1.",
        ),
        (
            is_served and o.stop == "event" and not (tokenizer_source(t) or t.stop_ids),
            "teacher.url and objective.stop = 'event': a server does not say what the teacher "
            "stops with; give its folder as teacher.tokenizer, or its ids as teacher.stop_ids.",
        ),
    ]


def engine_rules(config: Config) -> list[tuple[bool, str]]:
    """What is impossible about the servers of rollouts.

    Args:
        config: The configuration.

    Returns:
        For each rule whether it is broken, and the sentence that says so.
    """
    r = config.rollout
    fault = next((fault for url in r.url if (fault := url_fault(url))), "")
    return [
        (
            r.engine == "vllm" and not r.url,
            "rollout.engine = 'vllm' needs rollout.url, the address of a server, such as "
            '"http://127.0.0.1:8000/v1"; docs/engines.md says how to start one.',
        ),
        (
            r.engine != "vllm" and bool(r.url),
            "rollout.url is the address of a vLLM server, but rollout.engine is "
            f"{r.engine!r}; set rollout.engine = 'vllm' or leave the address out.",
        ),
        (bool(fault), f"rollout.url: {fault}"),
        (bool(key_fault(r.api_key_env)), f"rollout.api_key_env {key_fault(r.api_key_env)}"),
        (
            len(set(r.url)) < len(r.url),
            "rollout.url names a server twice; give each of them once.",
        ),
    ]


def url_fault(url: str) -> str:
    """What makes an address of a server unusable, in a sentence that holds no credentials.

    Args:
        url: The address.

    Returns:
        The sentence, or "".
    """
    if not url.isprintable() or " " in url:
        # urlsplit leaves out some of these, and a key may stand there.
        return "the address holds a space or a control character; write it as http://host:8000/v1."
    try:
        parts = urlsplit(url)
        port_fault = "" if parts.port is None or parts.port > 0 else "port 0"
        host = parts.hostname or ""
        if ":" not in host:
            host.encode("idna")
    except ValueError as error:  # UnicodeError is one
        told = "no host has this name" if isinstance(error, UnicodeError) else str(error)
        return f"the address is not one ({told}); write it as http://host:8000/v1."
    if parts.username is not None or parts.password is not None or "@" in url:
        return (
            "the address holds credentials, which would be kept in the run folder; leave them out "
            "and name an environment variable that holds the key."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or port_fault:
        return f"the address {url!r} is not one; write it as http://host:8000/v1."
    if parts.query or parts.fragment:
        return (
            "the address goes on with '?' or '#', where a key may stand; write it up to /v1 and "
            "name an environment variable that holds the key."
        )
    return ""


def key_fault(name: str) -> str:
    """What is wrong with the name of a key's environment variable, without repeating it.

    Args:
        name: The name; "" is none.

    Returns:
        How the sentence "the field NAME ..." goes on, or "".
    """
    is_name = name.isascii() and name.replace("_", "a").isalnum() and name.upper() == name
    if not name or (is_name and not name[0].isdigit()):
        return ""
    return (
        "must be the name of an environment variable, in capitals, such as TEACHER_API_KEY, and "
        "not the key itself, which would be kept in files."
    )


def tokenizer_source(teacher: TeacherConfig) -> str:
    """Where the files of a served teacher's tokenizer are.

    Args:
        teacher: The configuration of the teacher.

    Returns:
        A folder or hub name: `tokenizer`, or `model` where that is a folder here and nothing else
        is said; "" where there is none.
    """
    if teacher.tokenizer or teacher.stop_ids:
        return teacher.tokenizer
    return teacher.model if teacher.model and Path(teacher.model).is_dir() else ""
