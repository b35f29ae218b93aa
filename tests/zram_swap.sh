#!/bin/sh
# Runs a command with swap on a zram device, and takes the swap off again, whatever the command did.
#   tests/zram_swap.sh [--mib N] -- command...
# Exits with the command's status; 77 with a reason where no zram swap can be had.
set -u
mib=512
if [ "${1:-}" = --mib ]; then mib=$2; shift 2; fi
[ "${1:-}" = -- ] && shift
[ $# -gt 0 ] || { echo "usage: zram_swap.sh [--mib N] -- command..." >&2; exit 2; }
PATH=$PATH:/usr/sbin:/sbin

skip() { echo "SKIPPED: $1"; exit 77; }

[ "$(id -u)" = 0 ] || skip "zram swap needs root"
command -v mkswap >/dev/null && command -v swapon >/dev/null || skip "mkswap and swapon (util-linux) are not there"
if [ ! -e /sys/class/zram-control ]; then
  command -v modprobe >/dev/null || skip "no zram in this kernel, and no modprobe"
  modprobe zram 2>/dev/null || skip "modprobe zram failed"
fi

# A device that nobody uses: an idle one, or one more.
device= added=
for candidate in /sys/block/zram*; do
  [ -e "$candidate/disksize" ] || continue
  if [ "$(cat "$candidate/disksize")" = 0 ]; then device=${candidate##*/}; break; fi
done
if [ -z "$device" ]; then
  number=$(cat /sys/class/zram-control/hot_add 2>/dev/null) || skip "no idle zram device, and none can be added"
  device=zram$number added=$number
fi
[ -e "/dev/$device" ] || mknod "/dev/$device" b $(tr : ' ' <"/sys/block/$device/dev") || skip "no /dev/$device"

child=
clean_up() {
  trap - EXIT
  trap '' INT TERM HUP
  [ -n "$child" ] && kill "$child" 2>/dev/null
  swapoff "/dev/$device" 2>/dev/null
  echo 1 >"/sys/block/$device/reset" 2>/dev/null
  [ -n "$added" ] && echo "$added" >/sys/class/zram-control/hot_remove 2>/dev/null
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

echo "$((mib * 1024 * 1024))" >"/sys/block/$device/disksize" || skip "cannot size /dev/$device"
mkswap "/dev/$device" >/dev/null 2>&1 || skip "mkswap /dev/$device failed"
swapon "/dev/$device" 2>/dev/null || skip "swapon /dev/$device failed"
"$@" &
child=$!
wait "$child"
status=$?
child=
exit $status
