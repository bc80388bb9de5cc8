//! Images with real file systems, as distributions lay them out, and as
//! attackers do.

mod common;

use std::io;
use std::rc::Rc;

use common::{Tree, booted, gpt, load, refusal};
use hebe_image::{ImageError, Limits};

const GRUB: &str = r#"
if [ -s $prefix/grubenv ]; then load_env; fi
set default="${saved_entry}"
menuentry 'Debian GNU/Linux' --class debian --id simple {
    insmod ext2
    search --no-floppy --fs-uuid --set=root 11111111-2222-3333-4444-555555555555
    linux /boot/vmlinuz-2 root=UUID=11111111-2222-3333-4444-555555555555 ro  quiet
    initrd /boot/initrd.img-2
}
submenu 'Advanced' --id advanced {
    menuentry 'Debian, with Linux 1' --id one {
        linux /boot/vmlinuz-1 root=/dev/vda2 ro single
    }
}
"#;

fn debian() -> Tree {
    Tree::new()
        .file("boot/grub/grub.cfg", GRUB)
        .file("boot/vmlinuz-1", "the first kernel")
        .file("boot/vmlinuz-2", "the second kernel")
        .file("boot/initrd.img-2", "an initrd")
        .file("etc/fstab", "")
}

#[test]
fn a_debian_image_boots_its_default_entry_and_the_saved_one() {
    let esp = Tree::new().file("EFI/debian/grub.cfg", "x").fat();
    let disk = gpt(&[esp.clone(), debian().ext4()]);
    let boot = booted(&disk);
    assert_eq!(boot.title, "Debian GNU/Linux");
    let uuid = "11111111-2222-3333-4444-555555555555";
    assert_eq!(boot.cmdline, format!("root=UUID={uuid} ro quiet"));
    assert_eq!(boot.kernel, b"the second kernel");
    assert_eq!(boot.initrd, b"an initrd");
    let saved = "# GRUB Environment Block\nsaved_entry=advanced>one\n####";
    let disk = gpt(&[esp, debian().file("boot/grub/grubenv", saved).ext4()]);
    let boot = booted(&disk);
    assert_eq!(boot.cmdline, "root=/dev/vda2 ro single");
    assert_eq!(
        (boot.kernel, boot.initrd),
        (b"the first kernel".to_vec(), vec![])
    );
}

#[test]
fn a_whole_disk_file_system_and_a_small_block_size_do_as_well() {
    for (kind, block) in [("ext2", "1024"), ("ext3", "4096"), ("ext4", "2048")] {
        let disk = debian().made(kind, &["-b", block]);
        assert_eq!(booted(&disk).kernel, b"the second kernel", "{kind} {block}");
    }
}

#[test]
fn fedoras_entries_are_taken_by_version_with_a_boot_partition_of_their_own() {
    let entry = |version: &str| {
        format!(
            "title Fedora ({version})\nversion {version}\nlinux /vmlinuz-{version}\n\
             initrd /early.img $tuned_initrd\ninitrd /initramfs-{version}.img\n\
             options root=UUID=ab ro $kernelopts\n"
        )
    };
    let boot = || {
        Tree::new()
            .file(
                "grub2/grub.cfg",
                "load_env\nset default=\"${saved_entry}\"\nblscfg\n",
            )
            .file("loader/entries/m-6.9.1.conf", &entry("6.9.1"))
            .file("loader/entries/m-6.10.0.conf", &entry("6.10.0"))
            .file("vmlinuz-6.9.1", "nine")
            .file("vmlinuz-6.10.0", "ten")
            .file("early.img", "early")
            .file("initramfs-6.9.1.img", "init nine")
            .file("initramfs-6.10.0.img", "init ten")
    };
    let environment = |extra: &str| format!("# GRUB Environment Block\nkernelopts=quiet\n{extra}#");
    let root = Tree::new().file("etc/fstab", "").ext4();
    let newest = boot().file("grub2/grubenv", &environment("")).ext4();
    let found = booted(&gpt(&[newest, root.clone()]));
    assert_eq!(found.title, "Fedora (6.10.0)");
    assert_eq!(found.cmdline, "root=UUID=ab ro quiet");
    assert_eq!(found.kernel, b"ten");
    assert_eq!(found.initrd, b"early\0\0\0init ten");
    let saved = environment("saved_entry=m-6.9.1\n");
    let older = boot().file("grub2/grubenv", &saved).ext4();
    assert_eq!(booted(&gpt(&[older, root])).kernel, b"nine");
}

#[test]
fn systemd_boots_entries_lie_on_fat() {
    let esp = Tree::new()
        .file("loader/loader.conf", "default old*\n")
        .file("loader/entries/new.conf", "linux /linux/new\noptions a")
        .file(
            "loader/entries/old-1.conf",
            "linux /linux/old\noptions b  c",
        )
        .file("linux/old", "an old kernel")
        .fat();
    let boot = booted(&gpt(&[esp]));
    assert_eq!(
        (boot.kernel, boot.cmdline),
        (b"an old kernel".to_vec(), "b c".to_owned())
    );
}

#[test]
fn without_a_configuration_the_link_or_the_newest_kernel_boots() {
    let linked = Tree::new()
        .file("boot/vmlinuz-9", "nine")
        .file("boot/initrd.img-9", "initrd")
        .link("vmlinuz", "boot/vmlinuz-9")
        .link("initrd.img", "/boot/initrd.img-9")
        .file("etc/os-release", "");
    let boot = booted(&gpt(&[linked.ext4()]));
    assert_eq!(
        (boot.kernel, boot.initrd),
        (b"nine".to_vec(), b"initrd".to_vec())
    );
    assert_eq!(boot.cmdline, "root=/dev/vda1 ro");
    let newest = Tree::new()
        .file("vmlinuz-6.9.0", "nine")
        .file("vmlinuz-6.10.0", "ten")
        .file("initramfs-6.10.0.img", "i");
    let root = Tree::new()
        .file("etc/fstab", "")
        .file("etc/kernel/cmdline", "root=LABEL=x\n ro\n");
    let boot = booted(&gpt(&[newest.ext4(), root.ext4()]));
    assert_eq!((boot.kernel, boot.initrd), (b"ten".to_vec(), b"i".to_vec()));
    assert_eq!(boot.cmdline, "root=LABEL=x ro");
}

#[test]
fn what_does_not_boot_is_said_in_a_sentence() {
    let empty = Tree::new().file("readme", "");
    let said = refusal(&gpt(&[empty.ext4()]));
    assert!(
        said.contains("no boot entry") && said.contains("partition 1"),
        "{said}"
    );
    let mut xfs = vec![0; 1 << 20];
    xfs[..4].copy_from_slice(b"XFSB");
    let mut swap = vec![0; 1 << 20];
    swap[4086..4096].copy_from_slice(b"SWAPSPACE2");
    let said = refusal(&gpt(&[xfs, swap]));
    assert!(said.contains("it has xfs, swap"), "{said}");
    let said = refusal(&vec![0; 1 << 20]);
    assert!(said.contains("it has none"), "{said}");
    assert!(refusal(&[]).contains("cannot be read"));
    let config = |text: &str| Tree::new().file("boot/grub/grub.cfg", text).ext4();
    for (text, what) in [
        ("menuentry x {", "not closed"),
        ("menuentry x { linux /none }", "kernel /none"),
        ("menuentry x { linux /boot }", "kernel /boot"),
        ("menuentry x { chainloader +1 }", "boots no Linux"),
        ("blscfg", "no boot loader entry"),
        ("", "no menu entry"),
    ] {
        let said = refusal(&config(text));
        assert!(said.contains(what), "{text}: {said}");
        assert!(!said.contains('\n'), "{said}");
    }
}

#[test]
fn loops_of_links_and_deep_menus_end() {
    let looped = Tree::new()
        .link("boot/grub/grub.cfg", "grub.cfg")
        .link("boot/loader", "loader")
        .link("vmlinuz", "boot/vmlinuz")
        .link("boot/vmlinuz", "/vmlinuz");
    assert!(refusal(&looped.ext4()).contains("no boot entry"));
    let deep = "submenu s { ".repeat(2000) + &"}".repeat(2000);
    let deep = Tree::new().file("boot/grub/grub.cfg", &deep);
    assert!(refusal(&deep.ext4()).contains("too deep"));
    let outside = Tree::new()
        .file(
            "boot/grub/grub.cfg",
            "menuentry x { linux /../../../etc/passwd }",
        )
        .file("etc/hosts", "");
    assert!(refusal(&outside.ext4()).contains("which is not on it"));
}

#[test]
fn what_is_too_large_is_refused_by_its_name() {
    let disk = debian().ext4();
    let limits = |kernel, initrd| Limits { kernel, initrd };
    let mut sink = Vec::new();
    let source = Rc::new(disk.clone());
    let refused = load(source.clone(), limits(5, 100), &mut sink, &mut io::sink());
    assert!(matches!(
        refused,
        Err(ImageError::TooLarge {
            what: "kernel",
            max: 5,
            ..
        })
    ));
    assert!(sink.len() <= 5);
    let refused = load(source, limits(100, 5), &mut io::sink(), &mut io::sink());
    assert!(matches!(
        refused,
        Err(ImageError::TooLarge {
            what: "initrd",
            max: 5,
            ..
        })
    ));
    let config = "#".repeat((1 << 20) + 1);
    let large = Tree::new().file("boot/grub/grub.cfg", &config).ext4();
    assert!(refusal(&large).contains("larger than 1048576 bytes"));
}

/// Cut anywhere, and with any of its metadata overwritten, an image either
/// boots or is refused; nothing runs for long and nothing panics through.
#[test]
fn damaged_images_are_refused_or_boot() {
    let sound = gpt(&[debian().ext4()]);
    for len in (0..sound.len()).step_by(sound.len() / 97) {
        let _ = load(
            Rc::new(sound[..len].to_vec()),
            Limits::default(),
            &mut io::sink(),
            &mut io::sink(),
        );
    }
    let mut random = 0x2545_f491_4f6c_dd1du64;
    let mut boots = 0;
    for round in 0..400 {
        let mut disk = sound.clone();
        for _ in 0..1 + round % 8 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            // The table, the superblock, the groups, the inodes.
            let at = (random >> 16) as usize % (256 << 10);
            disk[at] = random as u8;
        }
        let done = load(
            Rc::new(disk),
            Limits::default(),
            &mut io::sink(),
            &mut io::sink(),
        );
        boots += u32::from(done.is_ok());
    }
    assert!((1..400).contains(&boots), "{boots} of 400 booted");
}
