from mamba2 import cli
from mamba2.study.grid import main

if __name__ == "__main__":
    cli.run(main)
