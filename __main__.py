"""`python -m onnxmesh` is the command line."""

from onnxmesh.cli import main

if __name__ == "__main__":
    main()
