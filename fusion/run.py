"""The entry of every launcher: `python -m fusion.run RECIPE` runs a recipe's steps on however many ranks there are."""

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fusion import _ending, _estimate, _keys, _launched, _machine, _ranks, recipe
from fusion._execute import Tell, execute, symlink
from fusion._options import Options, parse
from fusion._room import room
from fusion.plan import Plan, plan

USAGE = """usage: python -m fusion.run RECIPE [--out runs] [--only STEP] [--dry-run] [--key value ...]

  RECIPE      a recipe file, or the name of a packaged recipe
  --out       the directory of all runs (default: runs)
  --only      the name of one step's output: run this step alone, what it reads must be there
  --dry-run   say what would run
  --key value overrides this field of every train block, and is part of what a step's directory is named by
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; the process's exit status: 0 done, 1 a sentence said why not, 130 Ctrl-C, 143 SIGTERM."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(word in ("-h", "--help") for word in arguments):
        print(USAGE)
        return 0
    # read when torch is loaded: threads that spin while they wait make steps 10 times as long where cores are shared
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # libraries that load later on say what matters by raising; their bars are for terminals
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    ranks = _ranks.Ranks()
    try:
        options = parse(arguments)
        ranks = _ranks.of_environment(os.environ)
        ranks = _ranks.join(Path(options.out) / Path(options.recipe).stem, os.environ)
        with room(Path(options.out) / Path(options.recipe).stem, _keys.cache_directory()):
            run(options, ranks)
        status = 0
    except _ranks.Stopped:
        status = 1
    except KeyboardInterrupt:
        if ranks.fail():
            print("\nstopped; the same command continues", file=sys.stderr, flush=True)
        status = 130
    except _ranks.Terminated as error:
        if ranks.fail():
            print(f"fusion: {error}", file=sys.stderr, flush=True)
        status = 143
    except ValueError as error:
        if ranks.fail() and (ranks.rank == 0 or ranks.directory is not None):
            print(f"fusion: {error}", file=sys.stderr, flush=True)
        status = 1
    except BaseException as error:
        # the rank that failed first has said why; a killed one says nothing, and only its heartbeat tells
        if ranks.failed_elsewhere() or (ranks.world > 1 and _ranks.broken(error) and ranks.gone()):
            return 1
        ranks.fail()
        raise
    ranks.leave()
    return status


def run(options: Options, ranks: _ranks.Ranks) -> Plan:
    """Executes what is not done yet, and writes the report; the plan that was run."""
    loaded = recipe.load(options.recipe, options.overrides)
    planned = plan(loaded, options.out)
    alone = [options.only] if options.only is not None else [one.name for one in planned.steps]
    wanted = [planned[name] for name in alone]
    tell: Tell = partial(print, flush=True) if ranks.rank == 0 else _quiet
    pending = [one for one in wanted if not one.done]
    for one in wanted:
        missing = [name for name in one.inputs if not planned[name].done and name not in alone]
        if missing and not one.done:
            raise ValueError(f"{one.step.place}: it reads '{missing[0]}', which is not made yet; run without --only")
    if options.dry_run:
        for one in wanted:
            tell(f"{one.name}: {'is done' if one.done else 'would run'} ({one.step.verb}, {one.directory})")
        return planned
    if ranks.rank == 0:
        _estimate.refuse_full_disk(planned, pending)
    machine = _machine.here(loaded.overrides, ranks.local) if pending else _machine.Machine("cpu", {})
    if machine.train and any("train" in one.word.names for one in pending):
        added = ", ".join(f"{name}: {str(value).lower()}" for name, value in machine.train.items())
        tell(f"no accelerator here: {added} in every train block")
    said = _launched.check_processes(os.environ, ranks.world, machine.device, machine.devices) if pending else []
    launched = _launched.of_environment(os.environ, ranks.world, machine.device)
    for one in pending:
        _machine.check_train(one, machine)
        if "train" in one.word.names:
            train = _machine.arguments(one, machine).get("train") or {}
            said += _launched.check_train(train, launched, f"{one.step.place}.train")
    for line in said:
        tell(line)
    for one in wanted:
        execute(one, planned, machine, ranks, tell)
    if ranks.rank == 0:
        _finish(planned, tell)
    return planned


def _finish(planned: Plan, tell: Tell) -> None:
    """Links of what is current, and the report over all steps that are done."""
    done = [one for one in planned.steps if (one.directory / "done.json").is_file()]
    result = planned.recipe.result or next((one.name for one in reversed(planned.steps) if one.output == "model"), None)
    for one in done:
        symlink(planned.folder / one.name, one.directory.name)
        if one.name == result:
            symlink(planned.folder / "result", one.directory.name)
    if len(done) == len(planned.steps):
        from fusion import report

        report.write(planned.folder, planned.recipe, [(one.step, one.directory) for one in planned.steps])
        tell(f"{planned.folder / 'report.html'}")


def _quiet(*_: Any) -> None:
    """What ranks other than 0 say."""


if __name__ == "__main__":
    status = main()
    if status == 0:
        _ending.done()
    sys.exit(status)
