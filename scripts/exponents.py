"""`hfkd exponents CHECKPOINT`: how each tensor of a classifier scales, and which of them a generator is fitted to."""

from hfkd.models.probing import probe_pixels
from hfkd.models.scaling_exponents import solve_exponents

from .checkpoint import load_cohort
from .parser import Parser


def run(argv: list[str]) -> int:
    parser = Parser("exponents", __doc__)
    parser.add_argument("checkpoint", help="folder of a saved classifier, or a Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub checkpoint")
    parser.add_argument("--trust_remote_code", action="store_true", help="let the checkpoint run its own Python code")
    arguments = parser.parse_args(argv)
    cohort = load_cohort(
        arguments.checkpoint, trust_remote_code=arguments.trust_remote_code, revision=arguments.revision
    )
    side, channels = cohort.preprocessing.image_size, cohort.preprocessing.num_channels
    for number, student in enumerate(cohort.students):
        if len(cohort.students) > 1:
            print(f"student {number} ({type(student).__name__})")
        print(solve_exponents(student, probe_pixels(student, side, channels)).explain())
    return 0
