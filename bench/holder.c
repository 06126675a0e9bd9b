/* A process that holds ghosts in a mount namespace of its own, to be dumped by CRIU.
 *
 *     holder ROOT GHOSTS MOUNTS
 *
 * makes pid and mount namespaces whose root is ROOT, where this program lies as /holder, and says
 * which pid its child has here. The child opens ghosts of 4 KiB on read-only binds, says that it
 * is done by the directory /ready, and ends as soon as there is a file /go: restored, at once.
 * Linked statically, so that it maps nothing but itself.
 */

#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static const char content[4096];

static void check(int failed, const char *what)
{
	if (failed) {
		perror(what);
		exit(1);
	}
}

/* In the namespaces; the root is still the host's. */
static void enter(const char *root)
{
	check(setsid() < 0, "setsid");
	check(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL), "private mounts");
	check(mount(root, root, NULL, MS_BIND, NULL) || chdir(root), root);
	check(syscall(SYS_pivot_root, ".", ".") != 0 || umount2(".", MNT_DETACH), "pivot_root");
	check(mkdir("/proc", 0755) || mount("proc", "/proc", "proc", 0, NULL), "proc");
}

static void hold(int ghosts, int mounts)
{
	char name[64];
	struct rlimit limit;
	check(syscall(SYS_close_range, 0, ~0u, 0) != 0, "close_range");
	check(open("/null", O_RDWR | O_CREAT, 0600) != 0 || dup(0) != 1 || dup(0) != 2, "/null");
	check(getrlimit(RLIMIT_NOFILE, &limit), "getrlimit");
	limit.rlim_cur = limit.rlim_max;
	check(setrlimit(RLIMIT_NOFILE, &limit), "setrlimit");
	for (int number = 0; number < mounts; number++) {
		snprintf(name, sizeof name, "/m%d", number);
		check(mkdir(name, 0755) || mount(name, name, NULL, MS_BIND, NULL), name);
	}
	for (int number = 0; number < ghosts; number++) {
		snprintf(name, sizeof name, "/m%d/f%d", number % mounts, number);
		int fd = open(name, O_WRONLY | O_CREAT | O_EXCL, 0644);
		check(fd < 0 || write(fd, content, sizeof content) < 0, name);
		check(fchown(fd, 1000, 1000) || close(fd), name);
		check(open(name, O_RDONLY) < 0 || unlink(name), name);
	}
	for (int number = 0; number < mounts; number++) {
		snprintf(name, sizeof name, "/m%d", number);
		check(mount(NULL, name, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY, NULL), name);
	}
	check(mkdir("/ready", 0755), "/ready");
	while (access("/go", F_OK))
		usleep(1000);
	exit(0);
}

int main(int count, char **arguments)
{
	if (count != 4) {
		fputs("usage: holder ROOT GHOSTS MOUNTS\n", stderr);
		return 2;
	}
	if (!strcmp(arguments[1], "-"))
		hold(atoi(arguments[2]), atoi(arguments[3]));
	check(unshare(CLONE_NEWNS | CLONE_NEWPID), "unshare");
	pid_t pid = fork();
	check(pid < 0, "fork");
	if (!pid) {
		enter(arguments[1]);
		execl("/holder", "holder", "-", arguments[2], arguments[3], NULL);
		check(1, "exec");
	}
	printf("%d\n", pid);
	fflush(stdout);
	return waitpid(pid, NULL, 0) < 0;
}
