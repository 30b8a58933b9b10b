"""Run the whole quality benchmark: tuning, comparison, ablations, and two concepts in one image.

    cd examples/benchmarks/quality && python run.py --output_dir outputs --report_dir results

Takes about four hours on two cores; the same command resumes a stopped one.
"""

import argparse
from pathlib import Path

import ceiling
import compare
import file_sizes
import plain_prompts
import prompt_forms
import report
import two_concepts
from variants import OF_OTHER_BASES, PANELS


def main(args=None):
    """Run every part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quality"))
    parser.add_argument("--report_dir", type=Path, required=True)
    arguments = parser.parse_args(args)

    folders = ["--output_dir", str(arguments.output_dir), "--report_dir", str(arguments.report_dir)]
    for panel in (panel for panel in PANELS if panel not in OF_OTHER_BASES):
        compare.main(["--panel", panel, "--seeds", "2" if panel == "tuning" else "4", *folders[:2]])
        report.main(["--panel", panel, *folders])
    two_concepts.main(folders)
    plain_prompts.main(folders)
    prompt_forms.main(folders)
    ceiling.main(folders)
    file_sizes.main(folders[2:])


if __name__ == "__main__":
    main()
