// SPDX-License-Identifier: Apache-2.0
//! Drives a VMM through its life by the crate cloud-hypervisor-client, whose code is generated from Cloud Hypervisor's
//! own description of its API. Usage: SOCKET FOLDER KERNEL [INITRAMFS [CMDLINE]]. FOLDER has disk.img and takes a snapshot.
//!
//! A step that went as it should is a line on stdout; the first that did not ends the program with status 1.

use cloud_hypervisor_client::apis::{DefaultApi, Error};
use cloud_hypervisor_client::models::{
    BalloonConfig, ConsoleConfig, ConsoleMode, CpusConfig, DiskConfig, MemoryConfig, NetConfig, PayloadConfig,
    RestoreConfig, RngConfig, VmConfig, VmRemoveDevice, VmResize, VmSnapshotConfig, VmState,
};
use cloud_hypervisor_client::{socket_based_api_client, SocketBasedApiClient};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(600);
const MEMORY: i64 = 256 << 20;

type Done<T> = Result<T, String>;

fn say<T>(step: &str, result: Result<T, Error>) -> Done<T> {
    let value = result.map_err(|error| format!("{step}: {error}"))?;
    println!("{step}");
    Ok(value)
}

/// The status with which a call was refused.
fn refused<T>(step: &str, result: Result<T, Error>, status: u16) -> Done<()> {
    match result {
        Err(Error::Api(error)) if error.code.as_u16() == status && error.body.starts_with("[\"") => {
            println!("{step}: {status} {}", error.body);
            Ok(())
        }
        Err(error) => Err(format!("{step}: {error}, not status {status}")),
        Ok(_) => Err(format!("{step}: went through, instead of status {status}")),
    }
}

async fn expect_state(client: &SocketBasedApiClient, state: VmState) -> Done<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let info = client.vm_info_get().await.map_err(|error| format!("info: {error}"))?;
        if info.state == state {
            println!("state {state}");
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(format!("the state is {}, not {state}", info.state));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The guest takes its time to let a device go, and does not hear of it before its ACPI drivers are there: so it is
/// asked again and again.
async fn remove_until_gone(client: &SocketBasedApiClient, name: &str) -> Done<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut remove = VmRemoveDevice::new();
    remove.id = Some(name.to_string());
    loop {
        match client.vm_remove_device_put(remove.clone()).await {
            Err(Error::Api(error)) if error.code.as_u16() == 404 => {
                println!("gone {name}");
                return Ok(());
            }
            Err(error) => return Err(format!("remove-device: {error}")),
            Ok(_) if Instant::now() > deadline => return Err(format!("the guest keeps the device {name}")),
            Ok(_) => tokio::time::sleep(Duration::from_millis(500)).await,
        }
    }
}

fn machine(kernel: &str, initramfs: Option<&String>, cmdline: Option<&String>, disk: &str) -> VmConfig {
    let mut payload = PayloadConfig::new();
    payload.kernel = Some(kernel.to_string());
    payload.initramfs = initramfs.cloned();
    payload.cmdline = cmdline.cloned();
    let mut config = VmConfig::new(payload);
    config.cpus = Some(CpusConfig::new(2, 2));
    config.memory = Some(MemoryConfig::new(MEMORY));
    let mut first = DiskConfig::new();
    first.path = Some(disk.to_string());
    first.readonly = Some(true);
    config.disks = Some(vec![first]);
    config.rng = Some(RngConfig::new("/dev/urandom".to_string()));
    config.balloon = Some(BalloonConfig::new(0));
    config.console = Some(ConsoleConfig::new(ConsoleMode::Null));
    config
}

/// The first call; the VMM may still be about to listen.
async fn ping(client: &SocketBasedApiClient) -> Done<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match client.vmm_ping_get().await {
            Err(Error::HyperClient(_)) if Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            result => {
                println!("version {}", say("ping", result)?.version);
                return Ok(());
            }
        }
    }
}

async fn drive(arguments: &[String]) -> Done<()> {
    let [socket, folder, kernel, rest @ ..] = arguments else {
        return Err("usage: SOCKET FOLDER KERNEL [INITRAMFS [CMDLINE]]".to_string());
    };
    let client = socket_based_api_client(socket);
    let disk = format!("{folder}/disk.img");

    ping(&client).await?;
    refused("info before create", client.vm_info_get().await, 404)?;
    say("create", client.create_vm(machine(kernel, rest.first(), rest.get(1), &disk)).await)?;
    expect_state(&client, VmState::Created).await?;
    refused("pause before boot", client.pause_vm().await, 405)?;
    say("boot", client.boot_vm().await)?;
    expect_state(&client, VmState::Running).await?;
    let info = say("info", client.vm_info_get().await)?;
    if info.memory_actual_size != Some(MEMORY) || info.config.cpus.is_none_or(|cpus| cpus.boot_vcpus != 2) {
        return Err("info shows another machine".to_string());
    }

    say("pause", client.pause_vm().await)?;
    expect_state(&client, VmState::Paused).await?;
    say("resume", client.resume_vm().await)?;
    expect_state(&client, VmState::Running).await?;

    let mut second = DiskConfig::new();
    second.path = Some(disk.clone());
    second.readonly = Some(true);
    second.id = Some("second".to_string());
    let added = say("add-disk", client.vm_add_disk_put(second.clone()).await)?;
    println!("disk {} at {}", added.id, added.bdf);
    refused("add-disk of the same name", client.vm_add_disk_put(second).await, 409)?;
    let net = say("add-net", client.vm_add_net_put(NetConfig::new()).await)?;
    println!("net {} at {}", net.id, net.bdf);
    let tree = client.vm_info_get().await.map_err(|error| error.to_string())?.device_tree.unwrap_or_default();
    if !tree.contains_key("second") || !tree.contains_key(&net.id) {
        return Err(format!("the device tree lacks what was added: {:?}", tree.keys()));
    }
    let counters = say("counters", client.vm_counters_get().await)?;
    if !counters.contains_key("second") {
        return Err(format!("there are no counters of the disk: {:?}", counters.keys()));
    }
    let mut remove = VmRemoveDevice::new();
    remove.id = Some("second".to_string());
    say("remove-device", client.vm_remove_device_put(remove.clone()).await)?;
    remove_until_gone(&client, "second").await?;
    refused("remove-device again", client.vm_remove_device_put(remove).await, 404)?;
    let mut resize = VmResize::new();
    resize.desired_balloon = Some(16 << 20);
    say("resize", client.vm_resize_put(resize).await)?;
    let mut resize = VmResize::new();
    resize.desired_vcpus = Some(4);
    refused("resize to more processors", client.vm_resize_put(resize).await, 400)?;
    say("power-button", client.power_button_vm().await)?;
    say("reboot", client.reboot_vm().await)?;
    expect_state(&client, VmState::Running).await?;

    say("pause", client.pause_vm().await)?;
    let mut snapshot = VmSnapshotConfig::new();
    snapshot.destination_url = Some(format!("file://{folder}/snapshot"));
    say("snapshot", client.vm_snapshot_put(snapshot).await)?;
    say("delete", client.delete_vm().await)?;
    refused("info after delete", client.vm_info_get().await, 404)?;
    say("restore", client.vm_restore_put(RestoreConfig::new(format!("file://{folder}/snapshot"))).await)?;
    expect_state(&client, VmState::Paused).await?;
    say("resume", client.resume_vm().await)?;
    expect_state(&client, VmState::Running).await?;
    say("shutdown", client.shutdown_vm().await)?;
    expect_state(&client, VmState::Shutdown).await?;
    say("delete", client.delete_vm().await)?;
    say("shutdown-vmm", client.shutdown_vmm().await)?;
    Ok(())
}

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Err(problem) = drive(&arguments).await {
        eprintln!("{problem}");
        std::process::exit(1);
    }
    println!("all done");
}
