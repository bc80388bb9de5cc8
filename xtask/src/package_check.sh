# In a Debian tree with GRUB and initramfs-tools: the package is installed, used
# and removed with Debian's own tools. What they make is left in /out, where
# somebody else judges it.
set -eux
mkdir -p /out /boot/grub
kernel=$(basename /boot/vmlinuz-*)
initrd=/boot/initrd.img-${kernel#vmlinuz-}

# The machine as this check has it: 16 GiB, nothing reserved.
echo "root=/dev/vda1 ro quiet" >/cmdline
cat >/iomem <<END
00001000-0009fbff : System RAM
00100000-bfffffff : System RAM
100000000-43fffffff : System RAM
END
mount --bind /cmdline /proc/cmdline
mount --bind /iomem /proc/iomem
# grub-probe looks at disks, of which this tree has none. update-grub,
# grub-mkconfig and all of /etc/grub.d are Debian's.
cat >/probe <<'END'
#!/bin/sh
case "$*" in
*--target=device*) echo /dev/vda1 ;;
*--target=fs_uuid*) echo 01234567-89ab-4def-8123-456789abcdef ;;
*--target=fs*) echo ext2 ;;
*--target=partmap*) echo gpt ;;
*--target=compatibility_hint*) echo hd0,gpt1 ;;
esac
END
chmod 755 /probe
mount --bind /probe /usr/sbin/grub-probe

update-grub
cp /boot/grub/grub.cfg /out/before.cfg
lsinitramfs "$initrd" | sort >/out/initrd.before

dpkg -i /hebe.deb
dpkg --audit >/out/audit
lsinitramfs "$initrd" | sort >/out/initrd.with
unmkinitramfs "$initrd" /initrd
cat /initrd/conf/modules /initrd/main/conf/modules >/out/modules 2>/dev/null || true
systemctl is-enabled hebe-freeze.service hebe-resume.service hebed.socket hebed.service >/out/enabled
getent group hebe >/out/group

# Somebody's own file takes no notice of what others say.
echo 'GRUB_CMDLINE_LINUX="mine"' >/etc/default/grub.d/zz.cfg
if hebe host setup --size 4GiB --yes 2>/out/refused; then exit 1; fi
cp /boot/grub/grub.cfg /out/refused.cfg
test ! -e /etc/default/grub.d/hebe.cfg
rm /etc/default/grub.d/zz.cfg

hebe host setup --size 4GiB --yes --json >/out/setup.json
cp /boot/grub/grub.cfg /out/with.cfg
grub-script-check /boot/grub/grub.cfg
hebe host setup --yes --json >/out/again.json
# A kernel that comes later gets the words as well.
update-grub
cp /boot/grub/grub.cfg /out/later.cfg
hebe host setup --undo --yes --json >/out/undo.json
cp /boot/grub/grub.cfg /out/without.cfg

dpkg --remove hebe
lsinitramfs "$initrd" | sort >/out/initrd.after
dpkg --purge hebe
find / -xdev -path /out -prune -o -name '*hebe*' -print | sort >/out/left
