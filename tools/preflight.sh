#!/bin/sh
# preflight.sh PYTHON: names whatever the build needs and this machine lacks, one line for each.
#
# Python.h is the exception: where Debian's python3 came without it, the header is unpacked from
# Debian's own package into build/headers, which takes no privilege.  The Makefile points there.
set -u
python=$1
headers=build/headers
complete=yes

missing() { # what, Debian package
    echo "missing: $1; on Debian: apt install $2" >&2
    complete=no
}

compiles() { # header
    echo "#include <$1>" | ${CC:-gcc} -E -x c - >/dev/null 2>&1
}

apt() { # apt-get for a user without privilege, with the package lists in build/headers if told so
    apt-get -qq -o APT::Sandbox::User="$(id -un)" "$@" >/dev/null 2>&1
}

fetch_python_header() { # version
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || return 1
    echo "Python.h: fetching Debian's libpython$1-dev into $headers"
    rm -rf "$headers"
    mkdir -p "$headers/apt/lists/partial" "$headers/apt/cache/archives/partial"
    (
        cd "$headers" || exit 1
        own="-o Dir::State::Lists=$PWD/apt/lists -o Dir::Cache=$PWD/apt/cache"
        # The machine's package lists can be absent or out of date.
        # shellcheck disable=SC2086
        apt download "libpython$1-dev" ||
            { apt $own update && apt $own download "libpython$1-dev"; } || exit 1
        dpkg-deb --fsys-tarfile libpython"$1"-dev_*.deb | tar -x ./usr/include || exit 1
        rm -rf apt ./*.deb
        ln -s "python$1" usr/include/python3
    )
}

if ! command -v "$python" >/dev/null; then
    missing "$python" python3
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    missing "Python 3.11 or later ($python is older; PYTHON=... chooses another)" python3
elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    missing "the venv module of $python" python3-venv
fi

# shellcheck disable=SC2086  # CC may have arguments
if ! command -v ${CC:-gcc} >/dev/null; then
    missing "a C compiler" gcc
elif ! compiles stdio.h; then
    missing "the headers of the C library" libc6-dev
elif ! compiles linux/types.h; then
    missing "the headers of the kernel" linux-libc-dev
fi

if [ $complete = yes ]; then
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    found=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [ -f "$found/Python.h" ] || [ -f "$headers/usr/include/python$version/Python.h" ] ||
        fetch_python_header "$version" || missing "Python.h of $python" python3-dev
fi

[ $complete = yes ]
