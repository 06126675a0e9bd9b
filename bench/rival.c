/* What one process in C needs for the whole job of restoring ghosts: the yardstick of the
 * benchmarks.
 *
 *     rival clone|remount discard|keep IMAGES NS=PID...
 *
 * restores the ghosts of IMAGES that were in the mount namespaces NS (numbers of the images) into
 * those of the processes PID. It reads what says where a ghost was and how it was open: files.img,
 * remap-fpath.img and a mountpoints image for each namespace. Then, mount by mount, it makes one
 * writable clone that nobody else sees (clone) or the mount itself writable (remount), and for
 * each ghost: reads and decodes its image, creates it under a temporary name with content, owner,
 * mode and times, links it to its old name, opens that through the task's own mount, compares what
 * was opened with what was made, takes both names away and closes it. With keep the old name
 * stays.
 *
 * It is honest but bare: nothing is planned ahead, undone after a failure but the mount itself,
 * or recorded for a crash. Little endian and regular files only: what bench/images.py writes.
 * Source of the format: the .proto files of CRIU 4.2; criu/files-ghost.c for where content goes.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <linux/mount.h> /* not sys/mount.h beside it: some C libraries say all of it again */
#include <linux/openat2.h>

#define COMMON_MAGIC 0x54564319u
#define FILES_MAGIC 0x56303138u
#define REMAP_MAGIC 0x59133954u
#define GHOST_MAGIC 0x52583605u
#define MOUNTS_MAGIC 0x55563928u
#define TYPE_REG 1
#define REMAP_GHOST 1
#define BUFFER (1u << 20)
#define MAX_ID (1u << 26)

/* The kernel's own structure: not every C library has it. */
struct attributes {
	uint64_t set, clear, propagation, userns;
};

struct bytes {
	const uint8_t *at, *end;
};

struct file {
	struct bytes name;
	uint32_t mount, flags;
	uint64_t position;
};

struct mount {
	uint32_t id, target;
	bool read_only;
	struct bytes point;
};

struct ghost {
	uint32_t id;
	const struct file *file;
	const struct mount *mount;
	uint32_t directory; /* length of the part of the name before the last slash */
};

struct entry {
	uint32_t uid, gid, mode;
	bool chunks;
	uint64_t size;
	struct timespec times[2];
};

static int images = -1;
static uint8_t buffer[BUFFER];

/* The mount that is worked on; undone when the program fails. */
static int writable = -1;
static bool remounted;

static void set_read_only(int mount, bool read_only, const char *what);

__attribute__((noreturn, format(printf, 1, 2))) static void die(const char *format, ...)
{
	int error = errno;
	__builtin_va_list arguments;
	__builtin_va_start(arguments, format);
	fputs("rival: ", stderr);
	vfprintf(stderr, format, arguments);
	fprintf(stderr, ": %s\n", strerror(error));
	if (remounted) {
		remounted = false;
		set_read_only(writable, true, "putting a mount back");
	}
	exit(1);
}

__attribute__((noreturn)) static void broken(const char *what)
{
	errno = EBADMSG;
	die("%s", what);
}

static void *allocate(size_t count, size_t size)
{
	void *memory = calloc(count ? count : 1, size);
	if (!memory)
		die("memory");
	return memory;
}

/* -- protobuf ------------------------------------------------------------------------------- */

static uint64_t varint(struct bytes *in)
{
	uint64_t value = 0;
	for (unsigned shift = 0; shift < 64 && in->at < in->end; shift += 7) {
		uint8_t byte = *in->at++;
		value |= (uint64_t)(byte & 0x7f) << shift;
		if (!(byte & 0x80))
			return value;
	}
	broken("a number without an end");
}

static struct bytes slice(struct bytes *in, uint64_t length)
{
	if (length > (uint64_t)(in->end - in->at))
		broken("a field that is longer than its message");
	struct bytes out = {in->at, in->at + length};
	in->at += length;
	return out;
}

/* The number of the next field, or 0 at the end. CRIU's messages have no other wire types. */
static uint32_t field(struct bytes *in, uint64_t *value, struct bytes *inner)
{
	if (in->at == in->end)
		return 0;
	uint64_t key = varint(in);
	if ((key & 7) == 0)
		*value = varint(in);
	else if ((key & 7) == 2)
		*inner = slice(in, varint(in));
	else
		broken("a field of an unknown kind");
	return (uint32_t)(key >> 3);
}

static uint32_t word(struct bytes *in)
{
	uint32_t value;
	if (in->end - in->at < (ptrdiff_t)sizeof value)
		broken("an image that is cut");
	memcpy(&value, in->at, sizeof value);
	in->at += sizeof value;
	return value;
}

static struct bytes record(struct bytes *in)
{
	return slice(in, word(in));
}

static void head(struct bytes *in, uint32_t magic)
{
	if (word(in) != COMMON_MAGIC || word(in) != magic)
		broken("an image of another kind");
}

/* A whole image; missing: an empty one. */
static struct bytes whole_image(const char *name, uint32_t magic)
{
	int fd = openat(images, name, O_RDONLY | O_CLOEXEC);
	if (fd < 0 && errno == ENOENT)
		return (struct bytes){NULL, NULL};
	struct stat status;
	if (fd < 0 || fstat(fd, &status))
		die("%s", name);
	uint8_t *data = allocate((size_t)status.st_size, 1);
	ssize_t got = 0, length = 0;
	while ((got = read(fd, data + length, (size_t)(status.st_size - length))) > 0)
		length += got;
	if (got < 0)
		die("%s", name);
	close(fd);
	struct bytes image = {data, data + length};
	head(&image, magic);
	return image;
}

/* -- what was where ------------------------------------------------------------------------- */

static struct mount *mounts;
static size_t mount_count;

static void read_mounts(uint32_t namespace, uint32_t target)
{
	char name[64];
	snprintf(name, sizeof name, "mountpoints-%u.img", namespace);
	struct bytes image = whole_image(name, MOUNTS_MAGIC);
	size_t room = mount_count;
	while (image.at < image.end) {
		struct bytes in = record(&image), inner = {NULL, NULL};
		struct mount mount = {.target = target};
		uint64_t value = 0;
		for (uint32_t number; (number = field(&in, &value, &inner));) {
			if (number == 2)
				mount.id = (uint32_t)value;
			else if (number == 5)
				mount.read_only = value & MOUNT_ATTR_RDONLY;
			else if (number == 7)
				mount.point = inner;
		}
		if (mount_count == room) {
			room = room < 512 ? 1024 : 2 * room;
			mounts = realloc(mounts, room * sizeof *mounts);
			if (!mounts)
				die("memory");
		}
		mounts[mount_count++] = mount;
	}
	mounts = realloc(mounts, (mount_count + 1) * sizeof *mounts);
	if (!mounts)
		die("memory");
}

static int by_id(const void *left, const void *right)
{
	const struct mount *a = left, *b = right;
	return (a->id > b->id) - (a->id < b->id);
}

static const struct mount *find_mount(uint32_t id)
{
	struct mount key = {.id = id};
	const struct mount *found = bsearch(&key, mounts, mount_count, sizeof key, by_id);
	if (!found)
		broken("a file on a mount that no given namespace has");
	return found;
}

static struct file read_file(struct bytes in)
{
	struct file file = {.position = UINT64_MAX};
	struct bytes inner = {NULL, NULL};
	uint64_t value = 0;
	for (uint32_t number; (number = field(&in, &value, &inner));) {
		if (number == 2)
			file.flags = (uint32_t)value;
		else if (number == 3)
			file.position = value;
		else if (number == 6)
			file.name = inner;
		else if (number == 7)
			file.mount = (uint32_t)(value >> 1); /* zigzag */
	}
	return file;
}

static struct file *files;
static uint32_t file_room;

static void read_files(void)
{
	struct bytes image = whole_image("files.img", FILES_MAGIC);
	while (image.at < image.end) {
		struct bytes in = record(&image), inner = {NULL, NULL};
		uint64_t value = 0, type = 0, id = 0;
		for (uint32_t number; (number = field(&in, &value, &inner));) {
			if (number == 1)
				type = value;
			else if (number == 2)
				id = value;
			else if (number == 3 && type == TYPE_REG) {
				if (id > MAX_ID)
					broken("files.img");
				if (id >= file_room) {
					uint32_t room = 2 * (uint32_t)id + 1024;
					files = realloc(files, room * sizeof *files);
					if (!files)
						die("memory");
					memset(files + file_room, 0, (room - file_room) * sizeof *files);
					file_room = room;
				}
				files[id] = read_file(inner);
			}
		}
	}
}

static int by_place(const void *left, const void *right)
{
	const struct ghost *a = left, *b = right;
	if (a->mount->target != b->mount->target)
		return a->mount->target < b->mount->target ? -1 : 1;
	if (a->mount != b->mount)
		return a->mount < b->mount ? -1 : 1;
	uint32_t shorter = a->directory < b->directory ? a->directory : b->directory;
	int order = memcmp(a->file->name.at, b->file->name.at, shorter);
	if (!order && a->directory != b->directory)
		order = a->directory < b->directory ? -1 : 1;
	return order ? order : (a->id > b->id) - (a->id < b->id);
}

static struct ghost *read_remaps(size_t *count)
{
	struct bytes image = whole_image("remap-fpath.img", REMAP_MAGIC);
	/* A record has four bytes of length and three fields of two bytes at least. */
	struct ghost *ghosts = allocate((size_t)(image.end - image.at) / 10, sizeof *ghosts);
	while (image.at < image.end) {
		struct bytes in = record(&image), inner = {NULL, NULL};
		uint64_t value = 0, origin = 0, id = 0, type = 0;
		for (uint32_t number; (number = field(&in, &value, &inner));) {
			if (number == 1)
				origin = value;
			else if (number == 2)
				id = value;
			else if (number == 3)
				type = value;
		}
		if (type != REMAP_GHOST || origin >= file_room || !files[origin].name.at)
			broken("remap-fpath.img");
		struct ghost ghost = {.id = (uint32_t)id, .file = &files[origin]};
		ghost.mount = find_mount(ghost.file->mount);
		struct bytes name = ghost.file->name;
		const uint8_t *slash = memrchr(name.at, '/', (size_t)(name.end - name.at));
		if (!slash)
			broken("a name without a directory");
		ghost.directory = (uint32_t)(slash - name.at);
		ghosts[(*count)++] = ghost;
	}
	qsort(ghosts, *count, sizeof *ghosts, by_place);
	return ghosts;
}

/* -- mounts --------------------------------------------------------------------------------- */

static void set_read_only(int mount, bool read_only, const char *what)
{
	struct attributes change = {0};
	*(read_only ? &change.set : &change.clear) = MOUNT_ATTR_RDONLY;
	if (syscall(SYS_mount_setattr, mount, "", AT_EMPTY_PATH, &change, sizeof change))
		die("%s", what);
}

static char *terminated(const uint8_t *begin, size_t length)
{
	static char path[4096];
	if (length >= sizeof path)
		broken("a name that is too long");
	memcpy(path, begin, length);
	path[length] = 0;
	return path;
}

/* The root of a mount of the namespace that this process is in. */
static int open_mount(const struct mount *mount)
{
	const char *point = terminated(mount->point.at, (size_t)(mount->point.end - mount->point.at));
	int fd = open(point, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	struct statx status;
	if (fd < 0 || statx(fd, "", AT_EMPTY_PATH, 0, &status))
		die("%s", point);
	if (!(status.stx_attributes & STATX_ATTR_MOUNT_ROOT))
		broken("a mount point without a mount");
	return fd;
}

static int make_writable(int task, bool clone)
{
	int side = task;
	if (clone) {
		unsigned flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH;
		side = (int)syscall(SYS_open_tree, task, "", flags);
		if (side < 0)
			die("open_tree");
	}
	set_read_only(side, false, "making a mount writable");
	return side;
}

/* -- one ghost ------------------------------------------------------------------------------ */

static void read_time(struct bytes in, struct timespec *time)
{
	struct bytes inner;
	uint64_t value = 0;
	for (uint32_t number; (number = field(&in, &value, &inner));) {
		if (number == 1)
			time->tv_sec = (time_t)value;
		else if (number == 2)
			time->tv_nsec = (long)value * 1000;
	}
}

static struct entry read_entry(struct bytes in)
{
	struct entry entry = {.times = {{.tv_nsec = UTIME_OMIT}, {.tv_nsec = UTIME_OMIT}}};
	struct bytes inner = {NULL, NULL};
	uint64_t value = 0;
	for (uint32_t number; (number = field(&in, &value, &inner));) {
		if (number == 1)
			entry.uid = (uint32_t)value;
		else if (number == 2)
			entry.gid = (uint32_t)value;
		else if (number == 3)
			entry.mode = (uint32_t)value;
		else if (number == 7 || number == 8)
			read_time(inner, &entry.times[number - 7]);
		else if (number == 9)
			entry.chunks = value;
		else if (number == 10)
			entry.size = value;
	}
	if (!S_ISREG(entry.mode))
		broken("a ghost that is no regular file");
	return entry;
}

static void write_all(int fd, const uint8_t *data, size_t length, uint64_t offset)
{
	while (length) {
		ssize_t done = pwrite(fd, data, length, (off_t)offset);
		if (done < 0)
			die("writing a ghost");
		data += done;
		offset += (uint64_t)done;
		length -= (size_t)done;
	}
}

/* Copies `length` bytes at `position` of the image, which the buffer holds from `start` on. */
static void copy(int image, uint64_t start, size_t held, uint64_t position, int ghost,
		 uint64_t offset, uint64_t length)
{
	if (position >= start && position < start + held) {
		uint64_t here = start + held - position;
		if (here > length)
			here = length;
		write_all(ghost, buffer + (position - start), here, offset);
		position += here;
		offset += here;
		length -= here;
	}
	while (length) {
		ssize_t got = pread(image, buffer, length < BUFFER ? length : BUFFER, (off_t)position);
		if (got < 0)
			die("reading an image");
		if (!got)
			broken("an image that is cut");
		write_all(ghost, buffer, (size_t)got, offset);
		position += (uint64_t)got;
		offset += (uint64_t)got;
		length -= (uint64_t)got;
	}
}

static void copy_chunks(int image, struct bytes at, size_t held, int ghost, uint64_t size)
{
	uint64_t start = 0, position = (uint64_t)(at.at - buffer), end = 0;
	for (;;) {
		/* The header of a chunk: length word, two fields of at most eleven bytes each. */
		if (position + 26 > start + held) {
			ssize_t got = pread(image, buffer, BUFFER, (off_t)position);
			if (got < 0)
				die("reading an image");
			start = position;
			held = (size_t)got;
		}
		struct bytes in = {buffer + (position - start), buffer + held}, inner;
		if (in.at == in.end)
			break;
		struct bytes chunk = record(&in);
		uint64_t value = 0, length = 0, offset = 0;
		for (uint32_t number; (number = field(&chunk, &value, &inner));) {
			if (number == 1)
				length = value;
			else if (number == 2)
				offset = value;
		}
		if (offset < end || length > size || offset > size - length)
			broken("a chunk outside of its ghost");
		position = start + (uint64_t)(in.at - buffer);
		uint64_t filled = start + held;
		copy(image, start, held, position, ghost, offset, length);
		position += length;
		if (position > filled)
			held = 0; /* the buffer was used for the copy */
		end = offset + length;
	}
	if (end != size && ftruncate(ghost, (off_t)size))
		die("setting a size");
}

/* Make the ghost under the temporary name; what it must look like when it is opened. */
static struct stat create(const struct ghost *ghost, int directory, const char *temporary)
{
	char name[32];
	snprintf(name, sizeof name, "ghost-file-%x.img", ghost->id);
	int image = openat(images, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
	ssize_t held = image < 0 ? -1 : read(image, buffer, BUFFER);
	if (held < 0)
		die("%s", name);
	struct bytes at = {buffer, buffer + held};
	head(&at, GHOST_MAGIC);
	struct entry entry = read_entry(record(&at));
	int flags = O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC;
	int fd = openat(directory, temporary, flags, 0600);
	if (fd < 0)
		die("creating a ghost");
	if (entry.chunks)
		copy_chunks(image, at, (size_t)held, fd, entry.size);
	else {
		struct stat status;
		uint64_t position = (uint64_t)(at.at - buffer), size = (uint64_t)held - position;
		/* A full buffer may not be all. */
		if (held == BUFFER) {
			if (fstat(image, &status))
				die("%s", name);
			size = (uint64_t)status.st_size - position;
		}
		copy(image, 0, (size_t)held, position, fd, 0, size);
		entry.size = size;
	}
	close(image);
	struct stat made;
	if (fchown(fd, entry.uid, entry.gid) || fchmod(fd, entry.mode & 07777) ||
	    futimens(fd, entry.times) || fstat(fd, &made))
		die("owner, mode and times of a ghost");
	close(fd);
	if ((uint64_t)made.st_size != entry.size || made.st_mode != entry.mode)
		broken("a ghost that became another");
	return made;
}

static void restore(const struct ghost *ghost, int side, int task, bool keep)
{
	char temporary[32];
	snprintf(temporary, sizeof temporary, ".rival-%x", ghost->id);
	struct stat made = create(ghost, side, temporary), opened;
	struct bytes path = ghost->file->name;
	const uint8_t *begin = path.at + ghost->directory + 1;
	const char *name = terminated(begin, (size_t)(path.end - begin));
	if (linkat(side, temporary, side, name, 0))
		die("linking %s", name);
	int fd = openat(task, name, (int)ghost->file->flags | O_NOFOLLOW | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &opened))
		die("opening %s", name);
	if (opened.st_dev != made.st_dev || opened.st_ino != made.st_ino ||
	    opened.st_size != made.st_size || opened.st_mode != made.st_mode)
		broken("another file has the name");
	if (ghost->file->position && ghost->file->position != UINT64_MAX &&
	    lseek(fd, (off_t)ghost->file->position, SEEK_SET) < 0)
		die("position of %s", name);
	if ((!keep && unlinkat(side, name, 0)) || unlinkat(side, temporary, 0))
		die("removing the names of %s", name);
	close(fd);
}

/* -- all of them ---------------------------------------------------------------------------- */

static int open_directory(int above, const struct ghost *ghost)
{
	struct bytes point = ghost->mount->point;
	size_t skip = (size_t)(point.end - point.at);
	if (skip == 1)
		skip = 0; /* the root of the namespace */
	if (ghost->directory < skip || memcmp(ghost->file->name.at, point.at, skip))
		broken("a file outside of its mount");
	if (ghost->file->name.at[skip] != '/')
		broken("a file outside of its mount");
	if (ghost->directory == skip)
		return fcntl(above, F_DUPFD_CLOEXEC, 0);
	const char *path =
		terminated(ghost->file->name.at + skip + 1, ghost->directory - skip - 1);
	struct open_how how = {.flags = O_PATH | O_DIRECTORY | O_CLOEXEC,
			       .resolve = RESOLVE_BENEATH | RESOLVE_NO_XDEV |
					  RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS};
	return (int)syscall(SYS_openat2, above, path, &how, sizeof how);
}

static bool same_directory(const struct ghost *a, const struct ghost *b)
{
	return a->directory == b->directory &&
	       !memcmp(a->file->name.at, b->file->name.at, a->directory);
}

static void restore_mount(const struct ghost *ghost, const struct ghost *end, bool clone,
			  bool keep)
{
	int task = open_mount(ghost->mount), side = task;
	if (ghost->mount->read_only) {
		side = writable = make_writable(task, clone);
		remounted = !clone;
	}
	while (ghost < end) {
		const struct ghost *first = ghost;
		int live = open_directory(task, first);
		int service = side == task ? live : open_directory(side, first);
		if (live < 0 || service < 0)
			die("opening a directory");
		for (; ghost < end && same_directory(first, ghost); ghost++)
			restore(ghost, service, live, keep);
		close(live);
		if (service != live)
			close(service);
	}
	if (remounted) {
		set_read_only(task, true, "putting a mount back");
		remounted = false;
	}
	if (side != task)
		close(side);
	close(task);
}

static int usage(void)
{
	fputs("usage: rival clone|remount discard|keep IMAGES NS=PID...\n", stderr);
	return 2;
}

int main(int count, char **arguments)
{
	if (count < 5)
		return usage();
	bool clone = !strcmp(arguments[1], "clone"), keep = !strcmp(arguments[2], "keep");
	if ((!clone && strcmp(arguments[1], "remount")) ||
	    (!keep && strcmp(arguments[2], "discard")))
		return usage();
	images = open(arguments[3], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (images < 0)
		die("%s", arguments[3]);
	arguments += 4;
	uint32_t targets = (uint32_t)count - 4;
	int *namespaces = allocate(targets, sizeof *namespaces);
	for (uint32_t target = 0; target < targets; target++) {
		unsigned namespace, pid;
		char path[64];
		if (sscanf(arguments[target], "%u=%u", &namespace, &pid) != 2)
			return usage();
		snprintf(path, sizeof path, "/proc/%u/ns/mnt", pid);
		namespaces[target] = open(path, O_RDONLY | O_CLOEXEC);
		if (namespaces[target] < 0)
			die("%s", path);
		read_mounts(namespace, target);
	}
	qsort(mounts, mount_count, sizeof *mounts, by_id);
	read_files();
	size_t ghost_count = 0;
	const struct ghost *ghosts = read_remaps(&ghost_count), *ghost = ghosts,
			   *end = ghosts + ghost_count;
	umask(0);
	while (ghost < end) {
		const struct mount *mount = ghost->mount;
		const struct ghost *next = ghost;
		while (next < end && next->mount == mount)
			next++;
		if ((ghost == ghosts || ghost[-1].mount->target != mount->target) &&
		    setns(namespaces[mount->target], CLONE_NEWNS))
			die("setns");
		restore_mount(ghost, next, clone, keep);
		ghost = next;
	}
	printf("%zu ghosts\n", ghost_count);
	return 0;
}
