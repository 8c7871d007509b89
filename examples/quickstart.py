"""The README's first command: a model of transformers and one of diffusers, in one table."""

from __future__ import annotations

import bert
import unet
from compare import main

if __name__ == "__main__":
    main([bert.EXAMPLE, unet.EXAMPLE])
