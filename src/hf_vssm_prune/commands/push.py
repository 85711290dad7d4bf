"""Uploads a saved model to the Hub in one commit, or not at all. Files that have not changed are skipped.

hf-vssm-prune push runs/pruned/best user/plainmamba-l3-pruned --private
hf-vssm-prune push runs/pruned/best user/plainmamba-l3-pruned --dry_run
"""

import argparse
from collections.abc import Sequence

from hf_vssm_prune.commands import one_line_errors
from hf_vssm_prune.commands.parsing import command_parser
from hf_vssm_prune.hub.pushing import check_repo_id, list_pushed_files, push_model


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = command_parser(__doc__, prog)
    parser.add_argument("folder", help="folder written by a training run or `save_for_hub`")
    parser.add_argument("repo_id", help="repository on the Hub: user/name")
    parser.add_argument(
        "--revision", help="branch, created if it is missing, or open pull request (refs/pr/1); default: main"
    )
    parser.add_argument("--private", action="store_true", default=None, help="make the repository private")
    parser.add_argument("--commit_message", default="Upload model", help="default: %(default)s")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of pushing to the branch")
    parser.add_argument("--dry_run", action="store_true", help="list what would be pushed, without pushing")
    return parser


@one_line_errors()
def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    options = make_parser(prog).parse_args(arguments)
    check_repo_id(options.repo_id)
    files = list_pushed_files(options.folder)
    for file in files:
        print(f"{file.size:>12,}  {file.path.name}")
    print(f"{sum(file.size for file in files):>12,}  bytes in {len(files)} files")
    if options.dry_run:
        return 0
    commit = push_model(
        options.folder,
        options.repo_id,
        revision=options.revision,
        private=options.private,
        commit_message=options.commit_message,
        create_pr=options.create_pr,
    )
    print(commit.pr_url or commit.commit_url)
    return 0
