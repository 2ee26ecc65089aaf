#!/bin/sh
# The steps of the Dockerfiles, in a file so that tests can take them in a folder, without an engine for
# containers. To be run where requirements/ and pyproject.toml are; the first failure ends the build.
#
#   install.sh libraries VENV    makes VENV, with PyTorch and what requirements/$LOCK.txt names
#   install.sh gateway VENV      adds ourselves
#
# $TORCH is cpu or cuda, $TORCH_INDEX where the CPU build comes from.
set -eu
step=$1
venv=$2

# Not the environment's own pip: what is served has none.
install_into() {
    target=$1
    shift
    python3 -m pip --python "$target" install --no-cache-dir --no-deps "$@"
}

libraries() {
    case $TORCH in
        cpu) set -- --index-url "$TORCH_INDEX" ;;
        cuda) set -- ;;
        *) echo "TORCH is cpu or cuda, not '$TORCH'" >&2; exit 2 ;;
    esac
    python3 -m venv --without-pip "$venv"
    install_into "$venv" --require-hashes "$@" -r "requirements/torch-$TORCH.txt"
    install_into "$venv" --require-hashes -r "requirements/$LOCK.txt"
    # PyTorch's own tests, and headers for those who extend it: 195 MB. It looks for the program that is left.
    torch=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch
    rm -r "$torch/include" "$torch/test"
    find "$torch/bin" -type f ! -name torch_shm_manager -delete
}

gateway() {
    build=$(mktemp -d)
    python3 -m venv --without-pip "$build/venv"
    install_into "$build/venv" --require-hashes -r requirements/build.txt
    "$build/venv/bin/python" -m hatchling build --target wheel --directory "$build/dist"
    install_into "$venv" "$build"/dist/*.whl
    rm -r "$build"
    python3 -m pip --python "$venv" check
}

case $step in
    libraries | gateway) "$step" ;;
    *) echo "the steps are libraries and gateway, not '$step'" >&2; exit 2 ;;
esac
