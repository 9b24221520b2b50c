"""The command line: plan, run, launch, merge, list, show. Heavy libraries load inside the command that needs them."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from fusion import _ending

RAW = {"ignore_unknown_options": True, "allow_extra_args": True}


@contextmanager
def importing() -> Iterator[None]:
    """What is loaded inside stays to the end: nobody looks for garbage among its objects.

    Of torch's modules that takes 0.4 s of a command, while they are loaded and once more when it ends.
    """
    first = "torch" not in sys.modules
    if first:
        gc.disable()
    try:
        yield
    finally:
        if first:
            gc.freeze()
            gc.enable()


class _Commands(click.Group):
    """Commands in the order of use; a ValueError is a sentence for the user, without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except ValueError as error:
            click.echo(f"fusion: {error}", err=True)
            ctx.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fusion-trainer")
def main() -> None:
    """One network out of networks that were trained apart."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(
            0, str(Path.cwd())
        )  # words with a dot are found from where the command is given, as with python -m


@main.command(context_settings=RAW)
@click.argument("recipe")
@click.option("--out", default="runs", show_default=True, help="The directory of all runs.")
@click.option("--config", help="Check it for fusion launch with this configuration on this machine.")
@click.option("-n", "--num-processes", type=int, help="How many processes fusion launch would start.")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def plan(recipe: str, out: str, config: str | None, num_processes: int | None, overrides: tuple[str, ...]) -> None:
    """What will run, what is cached, and estimates of disk, RAM and time; exit 1 with sentences if it can't."""
    with importing():
        from fusion import _table
        from fusion._options import parse
        from fusion.plan import plan as check
        from fusion.recipe import load

    if config is None:
        options = parse([recipe, *overrides])
        _table.show_plan(check(load(options.recipe, options.overrides), out))
        return
    from fusion import _launch

    prepared = _launch.prepare(recipe, config, num_processes, out, overrides)
    _table.show_plan(prepared.plan)
    for line in prepared.said:
        click.echo(line)


@main.command(context_settings={**RAW, "help_option_names": []}, short_help="Run a recipe; what is done is skipped.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(arguments: tuple[str, ...]) -> None:
    """Run a recipe: the same options as python -m fusion.run."""
    from fusion.run import main as entry

    sys.exit(entry(arguments))


@main.command(context_settings=RAW)
@click.argument("recipe")
@click.option("--config", required=True, help="A configuration of accelerate: a name in launch/, or a file.")
@click.option("-n", "--num-processes", type=int, help="How many processes, all nodes together.")
@click.option("--out", help="The directory of all runs.")
@click.argument("extra", nargs=-1, type=click.UNPROCESSED)
def launch(recipe: str, config: str, num_processes: int | None, out: str | None, extra: tuple[str, ...]) -> None:
    """Run a recipe on several processes through accelerate; EXTRA goes to fusion run."""
    from fusion._launch import launch as start

    sys.exit(start(recipe, config, num_processes, out, extra))


@main.command()
@click.argument("method")
@click.option("--base", help="What all models started from; methods on task vectors need it.")
@click.option("--model", "models", multiple=True, required=True, metavar="DIR[:WEIGHT]", help="Once for each model.")
@click.option("--out", required=True, help="A directory that is not there yet.")
@click.option("--param", "params", multiple=True, metavar="NAME=VALUE", help="A parameter: fusion list merge.")
@click.option("--post", multiple=True, metavar="WORD", help="What follows, like '{lines: {alpha: 0.5}}'.")
@click.option("--only", multiple=True, metavar="GLOB", help="Merge these tensors; the others stay the base's.")
@click.option("--copy", multiple=True, metavar="GLOB", help="These tensors stay the base's.")
@click.option("--dtype", help="float32, bfloat16 or float16; the models' if left out.")
@click.option("--tokenizer", metavar="MODEL", help="Whose tokenizer is carried: base, or a model's directory name.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", type=int, help="Threads that compute; the machine's cores if left out.")
@click.option("--memory", default="512MiB", show_default=True, help="What regions of tensors may take.")
@click.option("--shard-size", default="5GB", show_default=True, help="Bytes of an output file.")
@click.option("--device", default="cpu", show_default=True, help="Where whole-tensor methods compute.")
def merge(
    method: str,
    models: tuple[str, ...],
    out: str,
    base: str | None,
    params: tuple[str, ...],
    post: tuple[str, ...],
    only: tuple[str, ...],
    copy: tuple[str, ...],
    dtype: str | None,
    tokenizer: str | None,
    seed: int,
    threads: int | None,
    memory: str,
    shard_size: str,
    device: str,
) -> None:
    """Merge checkpoints of one architecture by METHOD; the same command continues one that was stopped."""
    with importing():
        from fusion._merge_command import run

    run(
        method,
        models,
        out,
        base=base,
        params=params,
        post=post,
        only=only or None,
        copy=copy or None,
        dtype=dtype,
        tokenizer=tokenizer,
        seed=seed,
        threads=threads,
        memory=memory,
        shard_size=shard_size,
        device=device,
    )


@main.command("list")
@click.argument("room", required=False)
def list_words(room: str | None) -> None:
    """The words a recipe may use, with their parameters: all, or those of one ROOM."""
    from fusion import _table

    _table.show_words(room)


@main.command()
@click.argument("directories", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--base",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="What several checkpoints are compared with; the first of them if left out.",
)
def show(directories: tuple[Path, ...], base: Path | None) -> None:
    """One directory: tensors, dtypes, ties, tokenizer and provenance of a checkpoint, or the header of a store of
    targets. Several: how far each checkpoint is from the base and from the others, layer by layer."""
    if len(directories) == 1 and base is None:
        with importing():
            from fusion import _table

        _table.show_directory(directories[0])
    else:
        with importing():
            from fusion import _compare

        _compare.show(directories, base)


def command() -> None:
    """What the shell calls: `main`, and a quick end of what went well."""
    try:
        main()
    except SystemExit as end:  # click's
        if end.code == 0:
            _ending.done()
        raise


if __name__ == "__main__":
    command()
