"""Training of any task: ``deepspeed launch/train.py --recipe NAME [key=value …]`` runs the stage that the recipe names."""

try:
    from occstream.launch.run import main
except ImportError as error:
    raise SystemExit(f"cannot import occstream ({error}). From the repository's root run: pip install -e .") from None

if __name__ == "__main__":
    raise SystemExit(main())
