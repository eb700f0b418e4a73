"""`python -m timm_aikd train.py ...`: the explicit way to what the entry point does by itself."""
import sys

from .launch import run_script

USAGE = """usage: python -m timm_aikd SCRIPT [ARGUMENT ...]

Run a timm training script with AI-KD's options available: python -m timm_aikd train.py --aikd --aikd-teacher ...
Plain `python train.py --aikd ...` does the same unless TORCH_DEVICE_BACKEND_AUTOLOAD=0 or TIMM_AIKD_AUTOLOAD=0 is set.
"""


def main() -> None:
    """Run the script that the command line names."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ('-h', '--help'):
        print(USAGE, end='')
        sys.exit(0 if arguments else 2)
    try:
        open(arguments[0], 'rb').close()
    except OSError as error:
        sys.exit(f'python -m timm_aikd: cannot read {arguments[0]}: {error.strerror}; give the path of a script')
    run_script(arguments[0], arguments[1:])


if __name__ == '__main__':
    main()
