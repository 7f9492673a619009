#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# A Linux guest by hand: an unmodified QEMU with -accel mshv in the root partition. The guest computes the checksum of its
# disk, fetches a page from a web server in the root partition, and powers off.
#   docs/use/qemu-guest.sh [microvm|q35 [PROCESSORS]]
set -euo pipefail

machine=${1:-microvm}
processors=${2:-1}
export PATH=$(cd "$(dirname "$0")/../.." && pwd)/.venv/bin:$PATH
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# 1. QEMU comes from the distribution into the cache; the kernel of the root partition serves the guest as well.
qemu=$(rootvisor peer fetch)
kernel=$(rootvisor kernel path mshv)

# 2. The guest's first user space: busybox, and a script as its process 1.
mkdir -p "$folder"/ramdisk/{bin,dev,proc,sys}
cp "$(command -v busybox)" "$folder/ramdisk/bin/busybox"
cat >"$folder/ramdisk/init" <<'END'
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
echo "guest: Linux $(uname -r) with $(nproc) processors"
echo "guest: disk $(md5sum </dev/vda)"
ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up
echo "guest: page $(wget -q -O - http://10.0.2.2:8080/page | md5sum)"
poweroff -f
END
chmod +x "$folder/ramdisk/init"
(cd "$folder/ramdisk" && find . | cpio --quiet -o -H newc) >"$folder/initrd"

# 3. Its disk, and the page that it fetches.
mkdir "$folder/web"
head -c 4194304 /dev/urandom >"$folder/disk"
head -c 100000 /dev/urandom >"$folder/web/page"
echo "here:  disk $(md5sum <"$folder/disk")"
echo "here:  page $(md5sum <"$folder/web/page")"

# 4. QEMU's command line. A microvm has its devices at MMIO addresses, a q35 on PCI.
bus=pci
options=
rom=
if [ "$machine" = microvm ]; then
    bus=device
    machine+=,rtc=on
else
    machine+=,hpet=off
    options=pci=lastbus=0
    rom=,romfile=
fi
guest=(
    "$qemu" -accel mshv -cpu host -M "$machine" -smp "$processors" -m 256M -nodefaults -no-reboot
    -display none -serial stdio
    -kernel "$kernel" -initrd "$folder/initrd" -append "console=ttyS0 loglevel=5 panic=-1 $options"
    -drive "if=none,id=disk,format=raw,readonly=on,file=$folder/disk" -device "virtio-blk-$bus,drive=disk"
    -netdev user,id=net -device "virtio-net-$bus,netdev=net$rom"
)

# 5. The root partition runs the web server and QEMU (why with chrt: see qemu.md).
rootvisor run --memory 1G -- sh -c '
    busybox ifconfig lo 127.0.0.1
    busybox httpd -p 127.0.0.1:8080 -h "$1"
    shift
    exec chrt -f 1 "$@"' sh "$folder/web" "${guest[@]}" </dev/null
