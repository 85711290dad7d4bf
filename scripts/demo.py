"""`hf-vssm-prune demo`, as a file."""

import sys

from hf_vssm_prune.commands import script_main


main = script_main(__file__)

if __name__ == "__main__":
    sys.exit(main())
