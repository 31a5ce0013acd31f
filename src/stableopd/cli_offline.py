"""`stableopd score | golden`: the two commands of a teacher without a training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stableopd.config_templates import chosen_template, parse_kwargs

if TYPE_CHECKING:
    from stableopd.offline.source import Source

__all__ = ["ChatTemplate", "NoChatTemplate", "TemplateKwargs", "golden", "score"]

Model = Annotated[
    str, typer.Option(help="Teacher: folder, hub name, embedded; with --url its name there.")
]
Urls = Annotated[
    list[str], typer.Option("--url", help="A served teacher, up to /v1; repeat for replicas.")
]
Tokenizer = Annotated[str, typer.Option(help="Folder of a served teacher's tokenizer.")]
StopIds = Annotated[list[int], typer.Option("--stop-ids", help="Further ids that are a stop.")]
KeyEnv = Annotated[str, typer.Option(help="Environment variable with the server's key.")]
Gguf = Annotated[str, typer.Option(help="GGUF file in the model's folder.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")]
Dtype = Annotated[str, typer.Option(help="auto: bfloat16 on CUDA, else float32.")]
InFlight = Annotated[int, typer.Option(min=1, help="Requests under way at once.")]
TimeoutS = Annotated[float, typer.Option(min=0.1, help="Seconds for one answer of a server.")]
PatienceS = Annotated[
    float, typer.Option(min=0, help="Seconds without any answer until it is given up.")
]

ChatTemplate = Annotated[
    str,
    typer.Option(
        help="auto: the tokenizer's, for prompts without ids; none; or a file with a template."
    ),
]
NoChatTemplate = Annotated[
    bool, typer.Option("--no-chat-template", help="Take text as it is: --chat-template none.")
]
TemplateKwargs = Annotated[
    list[str],
    typer.Option(
        "--chat-template-kwargs",
        metavar="NAME=VALUE",
        help="Variables of the template, as enable_thinking=false; or one JSON object.",
    ),
]


def _source(
    model: str,
    url: list[str],
    tokenizer: str,
    stop_ids: list[int],
    api_key_env: str,
    gguf_file: str,
    device: str,
    dtype: str,
    max_in_flight: int,
    timeout_s: float,
    patience_s: float,
) -> Source:
    from stableopd.offline.source import Source

    return Source(
        model=model,
        urls=tuple(url),
        tokenizer=tokenizer,
        stop_ids=tuple(stop_ids),
        api_key_env=api_key_env,
        gguf_file=gguf_file,
        device=device,
        dtype=dtype,
        max_in_flight=max_in_flight,
        timeout_s=timeout_s,
        patience_s=patience_s,
    )


def score(
    rollouts: Annotated[Path, typer.Option(help="A run folder, or a file of rollouts.")],
    output: Annotated[Path, typer.Option(help="The .jsonl file to write.")],
    model: Model = "",
    url: Urls = [],  # noqa: B006 (typer reads the default and never changes it)
    stop: Annotated[str, typer.Option(help="event: any stop id; token: the one there.")] = "event",
    chat_template: ChatTemplate = "auto",
    no_chat_template: NoChatTemplate = False,
    chat_template_kwargs: TemplateKwargs = [],  # noqa: B006
    batch_tokens: Annotated[int, typer.Option(min=1, help="Of a local forward pass.")] = 8192,
    tokenizer: Tokenizer = "",
    stop_ids: StopIds = [],  # noqa: B006
    api_key_env: KeyEnv = "",
    gguf_file: Gguf = "",
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_in_flight: InFlight = 32,
    timeout_s: TimeoutS = 300.0,
    patience_s: PatienceS = 600.0,
) -> None:
    """Fill in the teacher's log-probs of rollouts; goes on after a kill."""
    from stableopd.offline.score import run_score

    source = _source(
        model, url, tokenizer, stop_ids, api_key_env, gguf_file, device, dtype,
        max_in_flight, timeout_s, patience_s,
    )  # fmt: skip
    template = chosen_template(chat_template, no_chat_template)
    kwargs = parse_kwargs(chat_template_kwargs)
    raise typer.Exit(run_score(source, rollouts, output, stop, template, batch_tokens, kwargs))


def golden(
    data: Annotated[str, typer.Option(help="Prompts: .jsonl, .parquet, folder, embedded.")],
    output: Annotated[Path, typer.Option(help="The .jsonl file to write.")],
    model: Model = "",
    url: Urls = [],  # noqa: B006
    num_samples: Annotated[int, typer.Option("-k", "--samples", min=1, help="Answers each.")] = 1,
    verified: Annotated[bool, typer.Option("--verified", help="Keep right answers alone.")] = False,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Of sampling.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 1024,
    max_problems: Annotated[int, typer.Option(min=0, help="0: all.")] = 0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Local answers written at once.")] = 64,
    grader: Annotated[
        str, typer.Option(help="math (math-verify), exact, or auto: math, embedded data exact.")
    ] = "auto",
    answer_marker: Annotated[str, typer.Option(help="What stands before an exact answer.")] = "",
    chat_template: ChatTemplate = "auto",
    no_chat_template: NoChatTemplate = False,
    chat_template_kwargs: TemplateKwargs = [],  # noqa: B006
    prompt_column: Annotated[str, typer.Option(help="Dots reach into objects.")] = "prompt",
    answer_column: Annotated[str, typer.Option(help="Dots reach into objects.")] = "answer",
    tokenizer: Tokenizer = "",
    stop_ids: StopIds = [],  # noqa: B006
    api_key_env: KeyEnv = "",
    gguf_file: Gguf = "",
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_in_flight: InFlight = 32,
    timeout_s: TimeoutS = 300.0,
    patience_s: PatienceS = 600.0,
) -> None:
    """Let a teacher write golden solutions, and keep the right ones; goes on after a kill."""
    from stableopd.offline.golden import Asked, run_golden

    source = _source(
        model, url, tokenizer, stop_ids, api_key_env, gguf_file, device, dtype,
        max_in_flight, timeout_s, patience_s,
    )  # fmt: skip
    asked = Asked(
        num_samples, verified, temperature, top_p, max_new_tokens, seed, batch_size, grader,
        answer_marker, chosen_template(chat_template, no_chat_template), prompt_column,
        answer_column, max_problems, parse_kwargs(chat_template_kwargs),
    )  # fmt: skip
    raise typer.Exit(run_golden(source, data, output, asked))
