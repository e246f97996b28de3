"""Train a byte-level language model with mixture-of-experts layers, and a dense twin with equal active parameters.

    python -m experiments.train_lm                          # under five minutes on two CPU cores
    python -m experiments.train_lm --steps 20               # a smoke test
    python -m experiments.train_lm --text book.txt log.txt  # your own text
    python -m experiments.train_lm --router mixtral --out runs/mixtral
    python -m experiments.train_lm --resume                 # after Ctrl-C, a kill or a power failure
    torchrun --nproc-per-node 2 -m experiments.train_lm --expert-parallel 2   # experts on two ranks

Both models start with the same attention weights and see the same batches in the same order. The program prints a table
and draws a picture of their cost and of their loss on files that neither has seen. `result.json` contains the results.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .language_model.corpus import Corpus, load_corpus
from .language_model.report import RESULT, draw, table, write_result
from .language_model.settings import Settings, add_options, settings_from
from .language_model.training import Training


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    settings = settings_from(args)
    corpus = load_corpus(args.text)
    training = make_training(args, settings, corpus)
    training.say(corpus)
    if not args.resume and not args.overwrite:
        training.refuse_to_overwrite()
    elif args.resume and training.has_checkpoint():
        training.load()
        training.say(f"going on after step {training.step}")
    try:
        training.run(args.stop_at)
    except KeyboardInterrupt:
        print(f"\nstopped; the last checkpoint is in {args.out}: pass --resume to continue from it")
        return 130
    if training.finished and training.first:
        report(training)
    training.close()
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    description, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--text", nargs="+", type=Path, default=[], help="files to train on, instead of Python's")
    parser.add_argument("--out", type=Path, default=Path("runs/train_lm"), help="folder for the checkpoint and results")
    parser.add_argument("--resume", action="store_true", help="resume from the checkpoint in --out, if any")
    parser.add_argument("--overwrite", action="store_true", help="start over even if --out has an unfinished run")
    parser.add_argument("--stop-at", type=int, help="save a checkpoint and stop after this step")
    parser.add_argument(
        "--expert-parallel", type=int, metavar="RANKS", help="shard experts and batch over torchrun's processes"
    )
    add_options(parser)
    return parser.parse_args(argv)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the formatting of the examples."""


def make_training(args: argparse.Namespace, settings: Settings, corpus: Corpus) -> Training:
    """Create a run in this process, or a run that several processes share."""
    if args.expert_parallel is None:
        return Training(settings, corpus, args.out)
    from .language_model.expert_parallel import ShardedTraining

    return ShardedTraining(settings, corpus, args.out, args.expert_parallel)


def report(training: Training) -> None:
    """Print the table, and write the results and the picture."""
    result = write_result(training)
    print(table(result["results"]))
    picture = training.out / "train_lm.png"
    draw(training.trainees, picture)
    print(f"wrote {training.out / RESULT} and {picture}")


if __name__ == "__main__":
    sys.exit(main())
