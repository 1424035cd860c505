"`python -m capo` is `capo`."
import sys

from .cli import main

sys.exit(main())
