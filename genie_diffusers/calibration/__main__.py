"""`accelerate launch -m genie_diffusers.calibration MODEL ...`."""

from .launch import main

if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"Error: {' '.join(str(error).split())}") from None
