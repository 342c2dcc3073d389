#!/usr/bin/env bash
# Makes the certificates of tests/serve.rs anew: an authority, a server and a client, good from 2020 to 2120, so that
# no clock that a test meets is outside. The authority's key is thrown away; the others open nothing but these tests.
set -euo pipefail
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

touch "$work/index.txt"
cat > "$work/ca.cnf" <<END
[ca]
default_ca = authority
[authority]
database = $work/index.txt
new_certs_dir = $work
default_md = sha256
policy = any
rand_serial = yes
[any]
commonName = supplied
[authority_extensions]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign
subjectKeyIdentifier = hash
[server_extensions]
basicConstraints = CA:FALSE
extendedKeyUsage = serverAuth
subjectAltName = DNS:localhost, IP:127.0.0.1
[client_extensions]
basicConstraints = CA:FALSE
extendedKeyUsage = clientAuth
END

make() { # NAME FOLDER OPTION…: a key in FOLDER, and a certificate
  local name=$1 folder=$2
  shift 2
  openssl genpkey -quiet -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$folder/$name.key" 2> /dev/null \
    || openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$folder/$name.key"
  openssl req -new -key "$folder/$name.key" -subj "/CN=ferrotron test $name" -out "$work/$name.csr"
  openssl ca -batch -notext -config "$work/ca.cnf" -startdate 20200101000000Z -enddate 21200101000000Z \
    -extensions "${name}_extensions" -in "$work/$name.csr" -out "$name.pem" "$@"
}
make authority "$work" -selfsign -keyfile "$work/authority.key"
for name in server client; do
  make "$name" . -cert authority.pem -keyfile "$work/authority.key"
done
