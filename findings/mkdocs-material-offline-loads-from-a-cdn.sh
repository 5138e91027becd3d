#!/usr/bin/env bash
# Pages that mkdocs-material's `offline` plugin makes load a script from unpkg.com, of whatever version it is then.
# Library: mkdocs-material 9.8.2, mkdocs 1.6.1.
# Guess: `offline` and `font: false` give a site that asks the network for nothing.
# Happens: each page begins with <script src="https://unpkg.com/iframe-worker/shim">, also where it is served over HTTP and
#   has no use for it; without a network the search of pages that are read from files does not work. A polyfill of one's own
#   with "iframe-worker" in its name takes its place (`extra: polyfills:`), or the `privacy` plugin fetches it at build.
# Who meets it: documentation for machines without a network, and whoever lets no third party run scripts in his pages.
# Seen: the script in each page with `offline`, in none without it or with a polyfill of one's own
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'mkdocs-material==9.8.2' 'mkdocs==1.6.1'
export NO_MKDOCS_2_WARNING=1

mkdir "$dir/docs"
echo '# A page' >"$dir/docs/index.md"
echo '// a shim' >"$dir/docs/iframe-worker.js"

# The scripts that the pages of a site with these plugins and this more load from elsewhere.
loaded() {
    printf '%s\n' 'site_name: a site' 'theme: {name: material, font: false}' "plugins: $1" "$2" >"$dir/mkdocs.yml"
    "$dir/venv/bin/python" -m mkdocs build --quiet --strict --config-file "$dir/mkdocs.yml" --site-dir "$dir/site"
    grep -oE 'src="https?://[^"]*"' "$dir/site/index.html" || echo nothing
}

without=$(loaded '[search]' '')
with=$(loaded '[search, offline]' '')
own=$(loaded '[search, offline]' 'extra: {polyfills: [iframe-worker.js]}')
echo "without the plugin: $without"
echo "with it: $with"
echo "with a polyfill of one's own: $own"
[[ $without == nothing && $own == nothing && $with == 'src="https://unpkg.com/iframe-worker/shim"' ]]
