"""rwkv-run: the command line, a thin layer over the public API.

This file loads neither torch nor plugins, so that `--help` is quick.
"""

from __future__ import annotations

import sys
import traceback
from typing import Any

import click

from rwkv_runtime import __version__, beginning, collector, driver
from rwkv_runtime.cli.command import OneLineCommand, nothing_to_lose
from rwkv_runtime.cli.formats import FORMATS
from rwkv_runtime.cli.options import (
    VARIABLES,
    CountType,
    PairType,
    StopType,
    read_config,
    sampler_params,
    typed,
    typed_params,
    unknown_variables,
)

EPILOG = """\b
Examples:
  rwkv-run
  rwkv-run "Once upon a time" --temperature 0.8
  rwkv-run --model model.pth --chat
  rwkv-run --model model.pth --prompts in.jsonl --output out.jsonl
  rwkv-run --samplers

Every option can also be set by a variable RWKV_RUN_<OPTION> or in a file given by --config; the command
line wins over the environment, the environment over the file."""


@click.command(
    cls=OneLineCommand,
    epilog=EPILOG,
    context_settings={
        "auto_envvar_prefix": VARIABLES.removesuffix("_"),
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
    },
)
@click.argument("prompt", required=False)
@click.option("--file", type=click.Path(), help="Read the prompt from a file; - is standard input.")
@click.option("-m", "--model", type=click.Path(), help="Checkpoint, .pth or .safetensors.  [default: the story model]")
@click.option("--vocab", type=click.Path(), help="Vocabulary file.  [default: MODEL.vocab.txt, else RWKV World's]")
@click.option("--sha256", help="Refuse a checkpoint whose SHA-256 is another.")
@click.option("-b", "--backend", default="auto", show_default=True, help="How to run the model; see --backends.")
@click.option("-s", "--sampler", default="nucleus", show_default=True, help="How to choose tokens: a name, or a,b,c.")
@click.option("--device", help="cpu, cuda or cuda:N.  [default: cuda where there is one]")
@click.option("--dtype", help="float32, bfloat16 or float16.  [default: the file's own]")
@click.option("--quant", help="int8: large matrices in 8 bits, half the memory.  [default: as they are]")
@click.option("--state-dtype", help="float16: the recurrent state in 16 bits.  [default: float32]")
@click.option("--threads", type=CountType(1, 1024), help="CPU threads.  [default: torch's own choice]")
@click.option("-n", "--max-tokens", type=CountType(1), default=512, show_default=True, help="Most tokens to write.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), help="Most seconds to write for.")
@click.option("--trials", type=CountType(1), default=1, show_default=True, help="Texts to write from the one prompt.")
@click.option("--seed", type=int, help="Seed of the first trial; the next ones count up.  [default: drawn]")
@click.option("--stop", type=StopType(), multiple=True, help=r"Text to stop before; \n is a newline. Repeatable.")
@click.option("--temperature", type=float, help="Sampler's temperature; 0 is greedy.")
@click.option("--top-p", type=float, help="Probability mass the sampler keeps.")
@click.option("--top-k", type=int, help="Number of tokens the sampler keeps.")
@click.option("-o", "--option", type=PairType(), nargs=2, multiple=True, help="A sampler's parameter. Repeatable.")
@click.option("--echo/--no-echo", default=True, show_default=True, help="Write the prompt before the text.")
@click.option("--chat", is_flag=True, help="Talk with the model, turn by turn.")
@click.option("--chat-format", type=click.Choice([*FORMATS]), default="world", show_default=True, help="Of --chat.")
@click.option("--prompts", type=click.Path(), help="Write from every line of a JSONL file; needs --output.")
@click.option("--output", type=click.Path(), help="Where --prompts writes; an interrupted run is taken up again.")
@click.option(
    "--rows", type=CountType(1, 4096), default=8, show_default=True, help="Prompts that --prompts writes at once."
)
@click.option("--load-state", type=click.Path(), help="Go on from a state saved before.")
@click.option("--save-state", type=click.Path(), help="Save the state after the text, to go on from it.")
@click.option("--json", "as_json", is_flag=True, envvar="RWKV_RUN_JSON", help="Write JSON lines instead of text.")
@click.option("--logprobs", type=CountType(1), help="With --json: log-probabilities of N candidates at each token.")
@click.option("--explain", is_flag=True, help="Show at each step the candidates, stage by stage, and the one drawn.")
@click.option("-q", "--quiet", is_flag=True, help="No figures on stderr.")
@click.option("--config", type=click.Path(), callback=read_config, is_eager=True, help="Options from a TOML file.")
@click.option("--plugins", "table", flag_value="plugins", help="Show what plugins are installed, and leave.")
@click.option("--backends", "table", flag_value="backends", help="Show the backends, usable or why not, and leave.")
@click.option("--samplers", "table", flag_value="samplers", help="Show the samplers with their options, and leave.")
@click.version_option(__version__, prog_name="rwkv-run")
@click.pass_context
def command(ctx: click.Context, /, **options: Any) -> None:
    """Write text with an RWKV language model.

    The prompt is the argument, or --file, or standard input.
    """
    if warning := unknown_variables(ctx):
        click.echo(f"warning: {warning}", err=True)
    with nothing_to_lose(), collector.lasting():
        if not options["table"]:
            beginning.begin(options["model"], options["vocab"], options["device"])
        from rwkv_runtime.cli.run import run  # torch is loaded here

    run(options | {"params": sampler_params(ctx), "typed": typed(ctx), "typed_params": typed_params(ctx)})


def main() -> None:
    """Entry point of `rwkv-run`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    try:
        command(prog_name="rwkv-run")
    except SystemExit as end:
        driver.leave(end.code if isinstance(end.code, int) else 1)
    except Exception:  # such as of a torch that cannot be imported; Python's own end would wait for what is beginning
        traceback.print_exc()
        driver.leave(1)
