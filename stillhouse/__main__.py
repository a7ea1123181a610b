"""``python -m stillhouse`` and ``accelerate launch -m stillhouse``."""

from stillhouse.cli import main

if __name__ == "__main__":
    main()
